// The state of the page. After a change to it, render() draws everything again.

import { defaults } from "./settings.js";
import { makeTree, pathTo } from "./tree.js";

export const state = {
  models: [],
  tree: makeTree(),
  begin: null, // the node where the last continuation began
  other: [], // tokens of B after it, in a comparison: {text, generated}
  sides: { A: { model: "", settings: defaults() }, B: { model: "", settings: { ...defaults(), temperature: 0.5 } } },
  shown: "A", // whose settings are shown
  comparing: false,
  running: null, // the AbortController of the running generation
  selected: null, // {ids, token: {id, text}}: the inspected token, and the token ids before it
  tab: "settings",
};

export const path = () => pathTo(state.tree.leaf);
export const infoOf = (name) => state.models.find((model) => model.name === name);
export const settings = () => state.sides[state.shown].settings;

const renderers = [];
export const onRender = (draw) => renderers.push(draw);
export const render = () => renderers.forEach((draw) => draw());

// Another text was opened, or the text was edited: resets what belongs to the last continuation.
export function textReplaced() {
  state.running?.abort();
  state.begin = state.selected = null;
  state.other = [];
  render();
}
