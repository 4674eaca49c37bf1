// Runs before the first paint, so that a chosen theme never flashes.
"use strict";

(() => {
  try {
    const chosen = localStorage.getItem("xeray-theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch {
    // Storage may be closed to this page; the system's theme is used then.
  }
})();
