// Going on with the text: a stream of tokens into the tree.

import { events } from "./api.js";
import { $, clamp } from "./dom.js";
import { paintNew, paintOther } from "./editor.js";
import { clearNotice, tell } from "./notice.js";
import { requestOf } from "./request.js";
import { changed, onChange, path, shapeOf, state } from "./state.js";
import { remember } from "./share.js";
import { add, lengthen, pathTo } from "./tree.js";

async function* continued(side, nodes, signal) {
  const shape = shapeOf(side.model);
  const body = { ...(await requestOf(side, nodes, signal)), stream: true, logprobs: 1 };
  let length = 0;
  for await (const { choices: [choice] } of events("v1/completions", body, signal)) {
    if (signal.aborted) return;
    const letters = [...choice.text];
    yield* tokensOf(letters, choice.logprobs, length, shape);
    length += letters.length;
  }
}

// `text_offset` says where in the whole text each token begins, in characters. What stands before the first is of the
// token that was said last: {text, said: null}.
function* tokensOf(letters, { token_ids, token_logprobs, text_offset }, length, shape) {
  const all = token_ids.map((id, i) => ({ id, logprob: token_logprobs[i], start: clamp(text_offset[i] - length, 0, letters.length) }));
  const said = all.filter(({ id }) => id !== shape.end_of_text);
  const starts = [...said.map(({ start }) => start), letters.length];
  if (starts[0]) yield { text: letters.slice(0, starts[0]).join(""), said: null };
  for (const [i, { id, logprob, start }] of said.entries()) {
    yield { text: letters.slice(start, starts[i + 1]).join(""), said: { id, logprob, vocabulary: shape.fingerprint } };
  }
}

// Writes A's tokens into the tree, after `begin`.
async function writeText(begin, signal) {
  let count = 0;
  for await (const { text, said } of continued(state.sides.A, pathTo(begin), signal)) {
    state.tree.leaf = said ? add(state.tree.leaf, text, said) : lengthen(state.tree.leaf, text);
    paintNew({ text, said });
    if (said) $("status").textContent = `${++count} tokens`;
  }
}

// Writes B's beside it, with A's seed.
async function writeOther(begin, signal) {
  const { A, B } = state.sides;
  const side = { ...B, settings: { ...B.settings, seed: A.settings.seed } };
  for await (const { text, said } of continued(side, pathTo(begin), signal)) {
    if (said || !state.other.length) state.other.push({ text, said });
    else state.other.at(-1).text += text;
    paintOther();
  }
}

export async function run(begin) {
  if (state.running || !state.models.length) return;
  const { signal } = (state.running = new AbortController());
  const started = performance.now();
  clearNotice();
  state.begin = state.tree.leaf = begin;
  state.other = [];
  state.chosen = null;
  changed();
  $("status").textContent = "Reading…";
  const works = [writeText(begin, signal), ...(state.comparing ? [writeOther(begin, signal)] : [])];
  await Promise.all(works).catch((error) => {
    tell(error, goOn);
    state.running.abort();
  });
  await Promise.allSettled(works);
  state.running = null;
  const tokens = state.begin === begin ? path().length - pathTo(begin).length : 0; // another text may be shown by now
  const rate = (1000 * tokens) / (performance.now() - started);
  $("status").textContent = `${signal.aborted ? "Stopped after " : ""}${tokens} tokens, ${rate.toFixed(0)} a second`;
  if (tokens) remember(path(), state.sides.A);
  changed();
}

export const goOn = () => run(state.tree.leaf);
export const stop = () => state.running?.abort();

// The same place with another seed.
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

export function wireWriting() {
  onChange(drawRunning);
  $("go").addEventListener("click", goOn);
  $("again").addEventListener("click", again);
  $("stop").addEventListener("click", stop);
}
