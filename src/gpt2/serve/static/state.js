// The state of the page. After a change to it, render() draws everything again.

import { defaults } from "./settings.js";
import { makeTree, pathTo } from "./tree.js";

export const state = {
  models: [],
  tree: makeTree(), // its leaf is the end of the text of A
  leafB: null, // the end of the text of B; null while that is the text of A
  begin: { A: null, B: null }, // the nodes where the last continuation began
  sides: { A: { model: "", settings: defaults() }, B: { model: "", settings: defaults() } },
  shown: "A", // the side whose settings and panels are shown
  comparing: false,
  running: null, // the AbortController of the running generation
  selected: null, // the inspected token: {side, node, before, token: {id, text}}; before: the tokens before it
  window: null, // what of the text of A fits the context: {tokens, chars, size}; null if all of it does
  tab: "settings",
  kept: new Set(), // the heads that an export holds, "layer.head"
  view: "token", // of the attention: at one token, or the matrices of all "heads"
};

export const leafOf = (side) => (side === "A" ? state.tree.leaf : (state.leafB ?? state.tree.leaf));
export const path = (side = "A") => pathTo(leafOf(side));
export const infoOf = (name) => state.models.find((model) => model.name === name);
export const settings = () => state.sides[state.shown].settings;
export const sidesShown = () => (state.comparing ? ["A", "B"] : ["A"]);

export function setLeaf(side, leaf) {
  if (side === "A") state.tree.leaf = leaf;
  else state.leafB = leaf;
}

const renderers = [];
export const onRender = (draw) => renderers.push(draw);
export const render = () => renderers.forEach((draw) => draw());

// Another text was opened, or the text was edited: resets what belongs to the last continuation.
export function textReplaced() {
  state.running?.abort();
  state.begin = { A: null, B: null };
  state.selected = state.leafB = null;
  render();
}
