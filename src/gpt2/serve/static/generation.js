// Generation: a stream of tokens into the tree.

import { events } from "./api.js";
import { $, clamp } from "./dom.js";
import { paintNew, paintTextB } from "./editor.js";
import { clearNotice, showError } from "./notice.js";
import { requestOf } from "./request.js";
import { render, onRender, path, infoOf, state } from "./state.js";
import { addToHistory } from "./share.js";
import { add, appendToLeaf, pathTo } from "./tree.js";

async function* streamTokens(side, nodes, signal) {
  const info = infoOf(side.model);
  const body = { ...(await requestOf(side, nodes, signal)), stream: true, logprobs: 1 };
  let length = 0;
  for await (const { choices: [choice] } of events("v1/completions", body, signal)) {
    if (signal.aborted) return;
    const letters = [...choice.text];
    yield* splitTokens(letters, choice.logprobs, length, info);
    length += letters.length;
  }
}

// `text_offset` is where each token begins in the whole text, in characters. Text before the first one belongs to the
// last token of the chunk before: {text, generated: null}.
function* splitTokens(letters, { token_ids, token_logprobs, text_offset }, length, info) {
  const all = token_ids.map((id, i) => ({ id, logprob: token_logprobs[i], start: clamp(text_offset[i] - length, 0, letters.length) }));
  const generated = all.filter(({ id }) => id !== info.end_of_text);
  const starts = [...generated.map(({ start }) => start), letters.length];
  if (starts[0]) yield { text: letters.slice(0, starts[0]).join(""), generated: null };
  for (const [i, { id, logprob, start }] of generated.entries()) {
    yield { text: letters.slice(start, starts[i + 1]).join(""), generated: { id, logprob, vocabulary: info.fingerprint } };
  }
}

// Adds the tokens of A to the tree, after `begin`.
async function generateA(begin, signal) {
  let count = 0;
  for await (const { text, generated } of streamTokens(state.sides.A, pathTo(begin), signal)) {
    state.tree.leaf = generated ? add(state.tree.leaf, text, generated) : appendToLeaf(state.tree.leaf, text);
    paintNew({ text, generated });
    if (generated) $("status").textContent = `${++count} tokens`;
  }
}

// Shows the tokens of B beside them, generated with the seed of A.
async function generateB(begin, signal) {
  const { A, B } = state.sides;
  const side = { ...B, settings: { ...B.settings, seed: A.settings.seed } };
  for await (const { text, generated } of streamTokens(side, pathTo(begin), signal)) {
    if (generated || !state.other.length) state.other.push({ text, generated });
    else state.other.at(-1).text += text;
    paintTextB();
  }
}

export async function run(begin) {
  if (state.running || !state.models.length) return;
  const { signal } = (state.running = new AbortController());
  const started = performance.now();
  clearNotice();
  state.begin = state.tree.leaf = begin;
  state.other = [];
  state.selected = null;
  render();
  $("status").textContent = "Prefill…";
  const streams = [generateA(begin, signal), ...(state.comparing ? [generateB(begin, signal)] : [])];
  await Promise.all(streams).catch((error) => {
    showError(error, continueText);
    state.running.abort();
  });
  await Promise.allSettled(streams);
  state.running = null;
  const tokens = state.begin === begin ? path().length - pathTo(begin).length : 0; // 0 if another text was opened meanwhile
  const rate = (1000 * tokens) / (performance.now() - started);
  $("status").textContent = `${signal.aborted ? "Stopped after " : ""}${tokens} tokens, ${rate.toFixed(0)} a second`;
  if (tokens) addToHistory(path(), state.sides.A);
  render();
}

export const continueText = () => run(state.tree.leaf);
export const stop = () => state.running?.abort();

// Generates again from the same position, with another seed.
function again() {
  const { settings } = state.sides.A;
  settings.seed = (settings.seed + 1) % 1000;
  run(state.begin ?? state.tree.leaf);
}

function drawRunning() {
  const on = state.running !== null;
  const [from, to] = on ? ["go", "stop"] : ["stop", "go"];
  const focused = document.activeElement === $(from);
  $("go").hidden = $("again").disabled = $("text").readOnly = on;
  $("stop").hidden = !on;
  if (focused) $(to).focus();
  document.body.classList.toggle("running", on);
}

export function wireGeneration() {
  onRender(drawRunning);
  $("go").addEventListener("click", continueText);
  $("again").addEventListener("click", again);
  $("stop").addEventListener("click", stop);
}
