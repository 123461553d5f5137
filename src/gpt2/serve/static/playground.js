// The page: what each part of it needs is tied together here.

import { ask } from "./api.js";
import { hideCard, wireCard } from "./card.js";
import { wireDialogs } from "./dialogs.js";
import { $ } from "./dom.js";
import { wireEditor } from "./editor.js";
import { wireInspector } from "./inspector.js";
import { tell, wireNotice } from "./notice.js";
import { checked } from "./settings.js";
import { draft, fromFragment, keepDraft } from "./share.js";
import { changed, moved, onChange, path, shapeOf, state } from "./state.js";
import { fillModels, wireSides } from "./sides.js";
import { packed, unpacked } from "./tree.js";
import { goOn, stop, wireWriting } from "./writing.js";

// Takes up what was kept or shared.
function take({ path: items, model, settings, b }) {
  unpacked(state.tree, items.slice(0, 20000));
  const { A, B } = state.sides;
  if (shapeOf(model)) A.model = model;
  A.settings = checked(settings);
  if (b) {
    if (shapeOf(b.model)) B.model = b.model;
    B.settings = checked(b.settings);
    state.comparing = true;
  }
  moved();
}

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && !$("alternatives").hidden) hideCard();
  else if (event.key === "Escape" && state.running) stop();
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) goOn();
  else return;
  event.preventDefault();
}

async function start() {
  try {
    state.models = (await ask("inspect/models")).models;
  } catch (error) {
    return tell(error, start);
  }
  fillModels();
  const kept = fromFragment(location.hash) ?? draft();
  if (Array.isArray(kept?.path)) take(kept);
  else changed();
  onChange(() => keepDraft({ path: packed(path()), ...state.sides.A }));
}

wireEditor();
wireSides();
wireCard();
wireInspector();
wireWriting();
wireNotice();
wireDialogs(take);
document.addEventListener("keydown", onKey);
addEventListener("hashchange", () => {
  const given = fromFragment(location.hash);
  if (given && state.models.length) take(given);
});
start();
