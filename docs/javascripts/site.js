// What axe asks of the theme's elements: tables that can be scrolled with the keyboard, and landmarks with distinct names.
function improve() {
  for (const wrap of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) wrap.tabIndex = 0;
  for (const nav of document.querySelectorAll("nav.md-code__nav:not([role])")) nav.setAttribute("role", "none");
  for (const nav of document.querySelectorAll("nav[data-md-level][aria-labelledby]")) {
    const label = document.getElementById(nav.getAttribute("aria-labelledby"))?.textContent.trim();
    const name = label || nav.querySelector(".md-nav__title")?.textContent.trim();
    if (!name || nav.dataset.mdLevel === "0") continue;
    nav.removeAttribute("aria-labelledby");
    nav.setAttribute("aria-label", `Pages of ${name}`);
  }
}

new MutationObserver(improve).observe(document.documentElement, { childList: true, subtree: true });
document.addEventListener("DOMContentLoaded", improve);
improve();
