// Error messages, each with a way to try again.

import { ApiError, runLatest, setKey } from "./api.js";
import { $ } from "./dom.js";

let retry = () => {};

// again: the function of "Try again".
export function showError(error, again) {
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

// `runLatest` that shows an error, unless one is shown already.
export function runLatestAndReport(pause, work) {
  const run = runLatest(pause, async (signal, ...args) => {
    try {
      await work(signal, ...args);
    } catch (error) {
      if (!signal.aborted && $("notice").hidden) showError(error, () => run(...args));
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
    setKey($("key").value.trim());
    $("key").value = "";
    tryAgain();
  });
}
