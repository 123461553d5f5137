// Text to token ids, for each model.

import { requestJson } from "./api.js";
import { startsGenerated } from "./tree.js";

const encoded = new Map();

export async function encode(text, info, signal) {
  if (!text) return [];
  const key = `${info.fingerprint}/${text}`;
  if (!encoded.has(key)) {
    if (encoded.size > 200) encoded.clear();
    encoded.set(key, (await requestJson("tokenize", { model: info.name, text }, signal)).tokens);
  }
  return encoded.get(key);
}

// The token ids of a path for a model: generated tokens keep their ids, and typed text is encoded. A path that does not
// begin with typed text has the end-of-text token before it.
export async function idsOf(path, info, signal) {
  const ids = startsGenerated(path) ? [info.end_of_text] : [];
  for (let i = 0; i < path.length; ) {
    if (hasVocabulary(path[i], info)) {
      ids.push(path[i++].generated.id);
      continue;
    }
    let text = "";
    while (i < path.length && !hasVocabulary(path[i], info)) text += path[i++].text;
    for (const id of await encode(text, info, signal)) ids.push(id);
  }
  return ids;
}

export const hasVocabulary = (node, info) => node.generated !== null && node.generated.vocabulary === info.fingerprint;
