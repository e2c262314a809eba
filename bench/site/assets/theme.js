// Light or dark: as the reader has chosen before, or as the system says. It runs before anything is drawn.
"use strict";
(() => {
  const kept = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const set = (dark) => {
    document.documentElement.classList.toggle("dark", dark);
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
    document.dispatchEvent(new Event("theme"));
  };
  const chosen = kept();
  set(chosen ? chosen === "dark" : system.matches);
  system.addEventListener("change", () => { if (!kept()) set(system.matches); });
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const dark = !document.documentElement.classList.contains("dark");
      try { localStorage.setItem("theme", dark ? "dark" : "light"); } catch { /* a browser that keeps nothing */ }
      set(dark);
    });
  });
})();
