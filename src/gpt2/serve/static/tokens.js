// Text to tokens, for each model; and the part of a text that fits its context.

import { requestJson } from "./api.js";
import { spansOf, startsGenerated } from "./tree.js";

const encoded = new Map();

export const hasVocabulary = (node, info) => node.generated !== null && node.generated.vocabulary === info.fingerprint;
export const idsOf = (tokens) => tokens.map(({ id }) => id);

export const encode = async (text, info, signal) => (await encodeWithTexts(text, info, signal)).tokens;

async function encodeWithTexts(text, info, signal) {
  if (!text) return { tokens: [], texts: [] };
  const key = `${info.fingerprint}/${text}`;
  if (!encoded.has(key)) {
    if (encoded.size > 200) encoded.clear();
    encoded.set(key, await requestJson("tokenize", { model: info.name, text }, signal));
  }
  return encoded.get(key);
}

// The tokens of a path for a model, {id, node, start}: generated tokens keep their ids, and typed text is encoded.
// start: where it begins in the text. A path that does not begin with typed text has the end-of-text token before it.
export async function tokensOf(path, info, signal) {
  const spans = spansOf(path);
  const tokens = startsGenerated(path) ? [{ id: info.end_of_text, node: null, start: 0, lead: true }] : [];
  for (let i = 0; i < path.length; ) {
    const { node, start } = spans[i];
    if (hasVocabulary(node, info)) {
      tokens.push({ id: node.generated.id, node, start });
      i += 1;
      continue;
    }
    let text = "";
    while (i < path.length && !hasVocabulary(path[i], info)) text += path[i++].text;
    const { tokens: ids, texts } = await encodeWithTexts(text, info, signal);
    startsIn(text, texts).forEach((at, t) => tokens.push({ id: ids[t], node: null, start: start + at }));
  }
  return tokens;
}

// Where each token begins in its text; a part of a character begins where that begins.
function startsIn(text, texts) {
  let at = 0, isPart = false;
  return texts.map((piece) => {
    const found = piece.includes("\ufffd") ? -1 : isPart ? text.indexOf(piece, at + 1) : text.startsWith(piece, at) ? at : -1;
    isPart = found < 0;
    const start = isPart ? at : found;
    if (!isPart) at = found + piece.length;
    return start;
  });
}

// The first token that generation sees. A longer text is cut in steps of a quarter of the context.
export function windowStart(count, size) {
  if (count < size) return 0;
  const step = Math.max(1, Math.floor(size / 4));
  return Math.min(count - 1, Math.ceil((count - size + 1) / step) * step);
}

export const inWindow = (tokens, info) => tokens.slice(windowStart(tokens.length, info.block_size));
