// Number keys choose, arrows turn pages. The page works without this.
"use strict";

const LOADED = performance.now();
const HASTE = 350; // ms: the second click of a double click, or a key held down, isn't meant for this page.
const PATIENCE = 3000; // ms after which a form may be sent once more: the server counts it once.
const form = document.querySelector("form");
let sent = false;

form.addEventListener("submit", (event) => {
  if (sent || performance.now() - LOADED < HASTE) event.preventDefault();
  else {
    sent = true;
    setTimeout(() => { sent = false; }, PATIENCE); // For an answer that never comes, and for "stop".
  }
});

addEventListener("pageshow", () => { sent = false; });

addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const key = { ArrowLeft: "#previous", ArrowRight: "#next", 0: "button[value=none]" }[event.key]
    ?? (/^[1-9]$/.test(event.key) ? `button[value="${event.key}"]` : null);
  if (key) document.querySelector(key)?.click();
});
