// After an edit: the new log-probabilities of the tokens behind it, and the edge of the context.

import { requestJson } from "./api.js";
import { $ } from "./dom.js";
import { runLatestAndReport } from "./notice.js";
import { onRender, path, infoOf, render, state } from "./state.js";
import { idsOf, tokensOf, windowStart } from "./tokens.js";

const PAUSE = 250; // ms after the last key

const update = runLatestAndReport(PAUSE, async (signal) => {
  if (state.running || !state.models.length) return;
  const info = infoOf(state.sides.A.model), nodes = path();
  const tokens = await tokensOf(nodes, info, signal);
  const start = windowStart(tokens.length, info.block_size);
  const window = start ? { tokens: start, chars: tokens[start].start, size: info.block_size } : null;
  const changed = JSON.stringify(window) !== JSON.stringify(state.window);
  state.window = window;
  const stale = tokens.filter(({ node }) => node?.generated.stale);
  if (stale.length) {
    const scored = (await requestJson("inspect/score", { model: info.name, tokens: idsOf(tokens) }, signal)).tokens;
    tokens.forEach(({ node }, i) => {
      if (node?.generated.stale) Object.assign(node.generated, { logprob: scored[i].logprob, stale: false });
    });
  }
  if (changed || stale.length) render();
});

function drawWindow() {
  const { window } = state;
  $("window").hidden = window === null;
  if (window) $("window").textContent = `The first ${window.tokens} tokens (hatched) are outside the context of ${window.size} tokens: the model does not see them.`;
}

export function wireRescore() {
  onRender(drawWindow);
  onRender(() => needsUpdate() && update());
}

let last = null;

// Whether the text, or the model that scores it, has changed.
function needsUpdate() {
  const key = [state.tree.leaf, state.sides.A.model, state.running === null, path().some(({ generated }) => generated?.stale)];
  const isNew = last === null || key.some((value, i) => value !== last[i]);
  last = key;
  return isNew;
}
