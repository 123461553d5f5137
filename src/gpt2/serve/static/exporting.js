// What an export holds: the text of a side with the probability, rank and alternatives of each token, and the attention
// of the chosen heads.

import { requestJson } from "./api.js";
import { rowOf, unpackTriangle } from "./matrix.js";
import { infoOf, path, state } from "./state.js";
import { idsOf, inWindow, tokensOf } from "./tokens.js";
import { startsOf, textOf } from "./tree.js";

const ALTERNATIVES = 8;

// Tokens outside the context are left out: the model does not see them.
export async function collect(name) {
  const side = state.sides[name], info = infoOf(side.model), nodes = path(name), text = textOf(nodes);
  const tokens = inWindow(await tokensOf(nodes, info), info), ids = idsOf(tokens);
  if (!text) throw new Error("There is no text to save.");
  const scored = await requestJson("inspect/score", { model: info.name, tokens: ids, top: ALTERNATIVES });
  const first = tokens[0].lead ? 1 : 0; // the end-of-text token is not part of the text
  const shown = text.slice(tokens[first]?.start ?? 0), starts = startsOf(scored.tokens, first, shown);
  const rows = scored.tokens.slice(first).map((token, i) => ({
    id: token.id,
    text: shown.slice(starts[i], starts[i + 1] ?? shown.length),
    bytes: token.bytes ?? undefined,
    by: tokens[i + first].node ? "model" : "you",
    probability: token.logprob === null ? null : Math.exp(token.logprob),
    rank: token.rank,
    alternatives: token.top ?? [],
  }));
  const heads = [];
  for (const [layer, head] of keptHeads(info)) heads.push(await attentionOf(layer, head, info, ids, first));
  return { model: side.model, settings: side.settings, text: shown, perplexity: scored.perplexity, tokens: rows, heads };
}

// The chosen heads that this model has.
export const keptHeads = (info) => [...state.kept].map((key) => key.split(".").map(Number)).filter(([layer, head]) => layer < info.n_layer && head < info.n_head);

async function attentionOf(layer, head, info, tokens, first) {
  const { weights, texts } = await requestJson("inspect/head", { model: info.name, tokens, layer, head });
  const at = unpackTriangle(weights, texts.length);
  const rows = texts.map((_, row) => rowOf(at, row, row + 1).map((weight) => Math.round(weight * 1e5) / 1e5));
  return { layer: layer + 1, head: head + 1, first, weights: rows }; // first: the index of the first token of the text
}
