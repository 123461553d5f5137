// Requests for a side (model and settings) and a text.

import { requestJson } from "./api.js";
import { biasesOf, linesOf } from "./settings.js";
import { path, infoOf, state } from "./state.js";
import { encode, idsOf, inWindow, tokensOf } from "./tokens.js";
import { pathTo, textOf } from "./tree.js";

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
  const prompt = idsOf(inWindow(await tokensOf(nodes, info, signal), info));
  return { model: side.model, prompt, ...(await fieldsOf(side, signal)) };
}

// The request that generated the current text, to be copied: its prompt is text if that has the same tokens.
// text: of the prompt, without what is outside the context.
export async function readableRequest(name) {
  const side = state.sides[name], info = infoOf(side.model);
  const nodes = state.begin[name] ? pathTo(state.begin[name]) : path(name);
  const request = await requestOf(side, nodes);
  const [first] = inWindow(await tokensOf(nodes, info), info);
  const text = textOf(nodes).slice(first.start);
  const plain = text ? await encode(text, info) : [info.end_of_text];
  return { text, request: String(plain) === String(request.prompt) ? { ...request, prompt: text } : request };
}

// The next tokens of a side after some tokens. Penalties count from the beginning of the last continuation.
export async function requestNextTokens(name, before, more, signal) {
  const side = state.sides[name], info = infoOf(side.model);
  const tokens = inWindow(before, info), cut = before.length - tokens.length;
  const begin = state.begin[name];
  const begun = begin ? (await tokensOf(pathTo(begin), info, signal)).length : before.length;
  const prompt_length = Math.max(0, Math.min(begun, before.length) - cut);
  const question = { model: side.model, tokens: idsOf(tokens), prompt_length, ...more };
  return requestJson("inspect/next", { ...(await fieldsOf(side, signal)), ...question }, signal);
}
