// The page: connects its parts.

import { requestJson } from "./api.js";
import { hideCard, wireCard } from "./card.js";
import { wireDialogs } from "./dialogs.js";
import { $ } from "./dom.js";
import { wireEditor } from "./editor.js";
import { clearHeat } from "./heat.js";
import { wireInspector } from "./inspector.js";
import { showError, wireNotice } from "./notice.js";
import { validSettings } from "./settings.js";
import { draft, fromFragment, keepDraft } from "./share.js";
import { wireRescore } from "./rescore.js";
import { render, textReplaced, onRender, path, infoOf, state } from "./state.js";
import { fillModels, wireSides } from "./sides.js";
import { makeTree, serialize, deserialize } from "./tree.js";
import { wireHelp } from "./help.js";
import { wireTour } from "./tour.js";
import { remember, wireUndo } from "./undo.js";
import { continueText, stop, wireGeneration } from "./generation.js";

// Loads a text from a link, the draft or the history.
function take({ path: items, model, settings, b }) {
  state.running?.abort();
  clearHeat();
  state.tree = makeTree();
  deserialize(state.tree, items.slice(0, 20000));
  const { A, B } = state.sides;
  if (infoOf(model)) A.model = model;
  A.settings = validSettings(settings);
  if (b) {
    if (infoOf(b.model)) B.model = b.model;
    B.settings = validSettings(b.settings);
    state.comparing = true;
  }
  textReplaced();
  remember("open");
}

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && !$("alternatives").hidden) hideCard();
  else if (event.key === "Escape" && state.running) stop();
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) continueText();
  else return;
  event.preventDefault();
}

async function start() {
  render();
  try {
    state.models = (await requestJson("inspect/models")).models;
  } catch (error) {
    return showError(error, start);
  }
  fillModels();
  const kept = (await fromFragment(location.hash)) ?? draft();
  if (Array.isArray(kept?.path)) take(kept);
  else render();
  remember("open");
  onRender(() => keepDraft({ path: serialize(path()), ...state.sides.A }));
}

wireEditor();
wireSides();
wireUndo();
wireRescore();
wireCard();
wireInspector();
wireGeneration();
wireNotice();
wireDialogs(take);
wireHelp();
wireTour();
document.addEventListener("keydown", onKey);
addEventListener("hashchange", async () => {
  const given = await fromFragment(location.hash);
  if (given && state.models.length) take(given);
});
start();
