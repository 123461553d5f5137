// What went wrong, and how to go on.

import { ApiError, latest, useKey } from "./api.js";
import { $ } from "./dom.js";

let retry = () => {};

// `again` is what "Try again" does.
export function tell(error, again) {
  if (error.name === "AbortError") return;
  if (!(error instanceof ApiError)) console.error(error);
  retry = again;
  $("notice").querySelector("p").textContent = error.message;
  $("notice").hidden = false;
  $("retry").hidden = $("dismiss").hidden = error.status === 401;
  $("key-form").hidden = error.status !== 401;
  if (error.status === 401) $("key").focus();
}

export function clearNotice() {
  $("notice").hidden = $("key-form").hidden = true;
}

// Work of which only the latest counts. If it fails it says so, unless something worse was said already.
export function quietly(pause, work) {
  const run = latest(pause, async (signal, ...args) => {
    try {
      await work(signal, ...args);
    } catch (error) {
      if (!signal.aborted && $("notice").hidden) tell(error, () => run(...args));
    }
  });
  return run;
}

function tryAgain() {
  clearNotice();
  retry();
}

export function wireNotice() {
  $("retry").addEventListener("click", tryAgain);
  $("dismiss").addEventListener("click", clearNotice);
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey($("key").value.trim());
    $("key").value = "";
    tryAgain();
  });
}
