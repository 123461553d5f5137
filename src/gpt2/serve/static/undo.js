// Undo and redo over leaves of the tree: typing, generation, alternatives and other texts.

import { $ } from "./dom.js";
import { onRender, state, textReplaced } from "./state.js";
import { restore } from "./tree.js";

const PAUSE = 800, MOST = 500; // ms of typing that is one step; steps
const text = $("text");
let steps = [], at = -1;

// Records the present text. kind: "typing" is joined with the typing just before.
export function remember(kind) {
  const { leaf } = state.tree, now = performance.now(), last = steps[at];
  if (last?.leaf === leaf) return;
  const step = { leaf, kind, time: now, cursor: text.selectionEnd };
  const joined = kind === "typing" && last?.kind === "typing" && now - last.time < PAUSE;
  steps = [...steps.slice(joined ? Math.max(0, steps.length - MOST) : Math.max(0, at + 2 - MOST), joined ? at : at + 1), step];
  at = steps.length - 1;
  draw();
}

function move(by) {
  if (!steps[at + by]) return;
  at += by;
  restore(state.tree, steps[at].leaf);
  textReplaced();
  text.setSelectionRange(steps[at].cursor, steps[at].cursor);
}

export const undo = () => move(-1);
export const redo = () => move(1);

function draw() {
  $("undo").disabled = at <= 0;
  $("redo").disabled = at >= steps.length - 1;
}

function onKey(event) {
  if (!(event.ctrlKey || event.metaKey) || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "z") event.shiftKey ? redo() : undo();
  else if (key === "y") redo();
  else return;
  event.preventDefault();
}

export function wireUndo() {
  onRender(draw);
  $("undo").addEventListener("click", undo);
  $("redo").addEventListener("click", redo);
  text.addEventListener("keydown", onKey);
  text.addEventListener("beforeinput", (event) => {
    if (!event.inputType.startsWith("history")) return;
    event.preventDefault();
    event.inputType === "historyUndo" ? undo() : redo();
  });
}
