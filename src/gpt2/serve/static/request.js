// From a side and a text to what the server is asked.

import { ask } from "./api.js";
import { biasesOf, linesOf } from "./settings.js";
import { path, shapeOf, state } from "./state.js";
import { encode, idsOf } from "./tokens.js";
import { pathTo, textOf } from "./tree.js";

const ENOUGH = 0.75; // of the context, once a text has outgrown it

// The fields of a request that settings stand for. Bad words are said neither at a beginning nor after a space.
export async function fieldsOf({ model, settings }, signal) {
  const { stop, bad_words, logit_bias, ...numbers } = settings;
  const shape = shapeOf(model), fields = { ...numbers };
  const banned = [];
  for (const word of wordsOf(settings)) banned.push(await encode(word, shape, signal), await encode(` ${word}`, shape, signal));
  const biases = {};
  for (const [what, bias] of biasesOf(logit_bias).pairs) {
    for (const id of typeof what === "number" ? [what] : await encode(what, shape, signal)) biases[id] = bias;
  }
  if (linesOf(stop).length) fields.stop = linesOf(stop);
  if (banned.length) fields.bad_words = banned;
  if (Object.keys(biases).length) fields.logit_bias = biases;
  return fields;
}

export const wordsOf = ({ bad_words }) => linesOf(bad_words).map((word) => word.replace(/^ /, "")).filter(Boolean);

export async function requestOf(side, nodes, signal) {
  const shape = shapeOf(side.model);
  let prompt = await idsOf(nodes, shape, signal);
  if (prompt.length >= shape.block_size) prompt = prompt.slice(-Math.floor(shape.block_size * ENOUGH));
  return { model: side.model, prompt, ...(await fieldsOf(side, signal)) };
}

// The request that made the text as it stands, for people: its prompt is text where that means the same tokens.
export async function readableRequest(side) {
  const nodes = state.begin ? pathTo(state.begin) : path();
  const shape = shapeOf(side.model), request = await requestOf(side, nodes), text = textOf(nodes);
  const plain = text ? await encode(text, shape) : [shape.end_of_text];
  return { text, request: String(plain) === String(request.prompt) ? { ...request, prompt: text } : request };
}

// What a side would say after some ids. What the penalties count begins where the last continuation began.
export async function askNext(side, ids, more, signal) {
  const begun = state.begin ? (await idsOf(pathTo(state.begin), shapeOf(side.model), signal)).length : ids.length;
  const question = { model: side.model, tokens: ids, prompt_length: Math.min(begun, ids.length), ...more };
  return ask("inspect/next", { ...(await fieldsOf(side, signal)), ...question }, signal);
}
