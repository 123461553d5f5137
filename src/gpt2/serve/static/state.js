// What the page knows. Whoever changes some of it calls changed(), and everything is drawn from it anew.

import { defaults } from "./settings.js";
import { makeTree, pathTo } from "./tree.js";

export const state = {
  models: [],
  tree: makeTree(),
  begin: null, // the node where the last continuation began
  other: [], // what B said after it, when two are compared: {text, said}
  sides: { A: { model: "", settings: defaults() }, B: { model: "", settings: { ...defaults(), temperature: 0.5 } } },
  shown: "A", // whose settings are shown
  comparing: false,
  running: null, // the AbortController of what is being written
  chosen: null, // {ids, token: {id, text}}: a token that is looked at, and what stood before it
  tab: "settings",
};

export const path = () => pathTo(state.tree.leaf);
export const shapeOf = (name) => state.models.find((model) => model.name === name);
export const settings = () => state.sides[state.shown].settings;

const drawings = [];
export const onChange = (draw) => drawings.push(draw);
export const changed = () => drawings.forEach((draw) => draw());

// Another text is shown, or the same one changed by hand: nothing of the last continuation holds for it.
export function moved() {
  state.running?.abort();
  state.begin = state.chosen = null;
  state.other = [];
  changed();
}
