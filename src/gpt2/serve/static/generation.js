// Generation: a stream of tokens into the tree, for one side or both.

import { events } from "./api.js";
import { $, clamp } from "./dom.js";
import { paintNew, startFollowing } from "./editor.js";
import { clearNotice, showError } from "./notice.js";
import { requestOf } from "./request.js";
import { render, onRender, path, infoOf, leafOf, setLeaf, sidesShown, state } from "./state.js";
import { addToHistory } from "./share.js";
import { add, appendToLeaf, pathTo } from "./tree.js";
import { remember } from "./undo.js";

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

// Adds the tokens of a side to the tree. In a comparison both sides have the seed of A.
async function generate(name, begin, signal) {
  const { A } = state.sides, side = state.sides[name];
  const used = name === "A" ? side : { ...side, settings: { ...side.settings, seed: A.settings.seed } };
  let count = 0;
  for await (const { text, generated } of streamTokens(used, pathTo(begin), signal)) {
    setLeaf(name, generated ? add(leafOf(name), text, generated) : appendToLeaf(leafOf(name), text));
    paintNew(name);
    if (generated && name === "A") $("status").textContent = `${++count} tokens`;
  }
}

// Generates from a node of each given side: {A: node, B: node}.
export async function run(starts) {
  if (state.running || !state.models.length) return;
  const { signal } = (state.running = new AbortController());
  const started = performance.now(), names = Object.keys(starts), main = names[0];
  clearNotice();
  if (state.comparing) state.leafB = starts.B ?? leafOf("B");
  for (const name of names) setLeaf(name, starts[name]);
  state.begin = { ...state.begin, ...starts };
  state.selected = null;
  startFollowing();
  render();
  $("status").textContent = "Prefill…";
  const streams = names.map((name) => generate(name, starts[name], signal));
  await Promise.all(streams).catch((error) => {
    showError(error, continueText);
    state.running.abort();
  });
  await Promise.allSettled(streams);
  state.running = null;
  const isSame = state.begin[main] === starts[main]; // false if another text was opened meanwhile
  const tokens = isSame ? path(main).length - pathTo(starts[main]).length : 0;
  const rate = (1000 * tokens) / (performance.now() - started);
  $("status").textContent = `${signal.aborted ? "Stopped after " : ""}${tokens} tokens, ${rate.toFixed(0)} a second`;
  if (isSame && starts.A) remember("generation");
  if (tokens) addToHistory(path(main), state.sides[main]);
  render();
}

const leaves = (of) => Object.fromEntries(sidesShown().map((name) => [name, of(name)]));

export const continueText = () => run(leaves(leafOf));
export const stop = () => state.running?.abort();

// Generates again from the same position, with another seed.
function again() {
  const { settings } = state.sides.A;
  settings.seed = (settings.seed + 1) % 1000;
  run(leaves((name) => state.begin[name] ?? leafOf(name)));
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
