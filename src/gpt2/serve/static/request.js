// Requests for a side (model and settings) and a text.

import { requestJson } from "./api.js";
import { biasesOf, linesOf } from "./settings.js";
import { path, infoOf, state } from "./state.js";
import { encode, idsOf } from "./tokens.js";
import { pathTo, textOf } from "./tree.js";

const KEPT_CONTEXT = 0.75; // of the context, for a text that is longer

// The fields of a request for these settings. Bad words are banned with and without a space before them.
export async function fieldsOf({ model, settings }, signal) {
  const { stop, bad_words, logit_bias, ...numbers } = settings;
  const info = infoOf(model), fields = { ...numbers };
  const banned = [];
  for (const word of badWordsOf(settings)) banned.push(await encode(word, info, signal), await encode(` ${word}`, info, signal));
  const biases = {};
  for (const [what, bias] of biasesOf(logit_bias).pairs) {
    for (const id of typeof what === "number" ? [what] : await encode(what, info, signal)) biases[id] = bias;
  }
  if (linesOf(stop).length) fields.stop = linesOf(stop);
  if (banned.length) fields.bad_words = banned;
  if (Object.keys(biases).length) fields.logit_bias = biases;
  return fields;
}

export const badWordsOf = ({ bad_words }) => linesOf(bad_words).map((word) => word.replace(/^ /, "")).filter(Boolean);

export async function requestOf(side, nodes, signal) {
  const info = infoOf(side.model);
  let prompt = await idsOf(nodes, info, signal);
  if (prompt.length >= info.block_size) prompt = prompt.slice(-Math.floor(info.block_size * KEPT_CONTEXT));
  return { model: side.model, prompt, ...(await fieldsOf(side, signal)) };
}

// The request that generated the current text, to be copied: its prompt is text if that has the same tokens.
export async function readableRequest(side) {
  const nodes = state.begin ? pathTo(state.begin) : path();
  const info = infoOf(side.model), request = await requestOf(side, nodes), text = textOf(nodes);
  const plain = text ? await encode(text, info) : [info.end_of_text];
  return { text, request: String(plain) === String(request.prompt) ? { ...request, prompt: text } : request };
}

// The next tokens of a side after some ids. Penalties count from the beginning of the last continuation.
export async function requestNextTokens(side, ids, more, signal) {
  const begun = state.begin ? (await idsOf(pathTo(state.begin), infoOf(side.model), signal)).length : ids.length;
  const question = { model: side.model, tokens: ids, prompt_length: Math.min(begun, ids.length), ...more };
  return requestJson("inspect/next", { ...(await fieldsOf(side, signal)), ...question }, signal);
}
