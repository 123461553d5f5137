// What the panels inspect: the chosen token, or the last generated one, or the end of the text.

import { requestJson } from "./api.js";
import { infoOf, path, state } from "./state.js";
import { hasVocabulary, idsOf, inWindow, tokensOf } from "./tokens.js";
import { spansOf } from "./tree.js";

// The token to inspect: the selected one, or the last generated one.
export async function selectedToken(signal) {
  const side = state.shown, info = infoOf(state.sides[side].model);
  if (state.selected?.side === side) return withStart(state.selected);
  const nodes = path(side);
  const i = nodes.findLastIndex((node) => hasVocabulary(node, info));
  if (i < 0) return null;
  const before = await tokensOf(nodes.slice(0, i), info, signal);
  return withStart({ side, node: nodes[i], before, token: { id: nodes[i].generated.id, text: nodes[i].text } });
}

const withStart = (selected) => {
  const found = spansOf(path(selected.side)).find(({ node }) => node === selected.node);
  return { ...selected, start: selected.start ?? found?.start };
};

// {info, ids, token, likely}: the ids of the tokens before the chosen token or the end of the text; the chosen token, or
// the most likely one; and the most likely ones, without any sampling setting. Null for an empty text.
export async function subject(signal) {
  const info = infoOf(state.sides[state.shown].model);
  const chosen = state.selected?.side === state.shown ? state.selected : null;
  const before = chosen ? chosen.before : await tokensOf(path(state.shown), info, signal);
  const ids = idsOf(inWindow(before, info));
  if (!ids.length || !(chosen || path(state.shown).length)) return null;
  const { tokens: likely } = await requestJson("inspect/next", { model: info.name, tokens: ids, top: 12, top_k: 0 }, signal);
  return { info, ids, chosen, token: chosen ? chosen.token : likely[0], likely };
}
