// Chooses the page by what follows the # of the address, and keeps what all pages share: key, connection, colours.

import { ApiError, key, onConnection } from "./api.js";
import { failure, h, show } from "./dom.js";
import * as comparisons from "./pages/comparisons.js";
import * as evaluations from "./pages/evaluations.js";
import * as job from "./pages/job.js";
import * as keys from "./pages/keys.js";
import * as models from "./pages/models.js";
import * as newJob from "./pages/new_job.js";
import * as queue from "./pages/queue.js";
import * as webhooks from "./pages/webhooks.js";

const ROUTES = [
  [/^$/, "queue", queue.render],
  [/^new$/, "new", newJob.render],
  [/^jobs\/([^/]+)$/, "queue", job.render],
  [/^evaluations$/, "evaluations", evaluations.renderList],
  [/^evaluations\/([^/]+)$/, "evaluations", evaluations.render],
  [/^items\/([^/]+)$/, "evaluations", evaluations.renderItems],
  [/^comparisons$/, "comparisons", comparisons.renderList],
  [/^comparisons\/([^/]+)$/, "comparisons", comparisons.render],
  [/^models$/, "models", models.render],
  [/^keys$/, "keys", keys.render],
  [/^webhooks$/, "webhooks", webhooks.render],
  [/^webhooks\/([^/]+)$/, "webhooks", webhooks.renderOne],
];
const main = document.querySelector("#main");
let leave = new AbortController();

/** Show the page of the address. Everything the page before had begun ends here. */
async function open() {
  leave.abort();
  leave = new AbortController();
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [pattern, name, render] = ROUTES.find(([each]) => each.test(path)) ?? [];
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.page === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const words = render && wordsOf(pattern.exec(path));
  if (!words) return main.replaceChildren(notFound(path));
  const root = h("div.page");
  main.replaceChildren(root);
  root.append(h("p.loading", { role: "status" }, "Loading…"));
  const page = new Page(root, leave.signal, new URLSearchParams(query), () => render(root, page, ...words));
  await page.attempt(page.render);
}

/** What stands in the address, decoded; null where that cannot be. */
function wordsOf([, ...words]) {
  try {
    return words.map(decodeURIComponent);
  } catch {
    return null;
  }
}

function notFound(path) {
  return h("div.page", null, h("h1", null, "There is no such page"), h("p", null, `Nothing is at #/${path}. `, h("a", { href: "#/" }, "Go to the queue")));
}

/** What a page may ask of its surroundings: parameters, repetition, an end. */
class Page {
  constructor(root, signal, params, render) {
    Object.assign(this, { root, signal, params, render });
  }

  /** The title tells the phase: where it changes, it is read out. */
  title(text) {
    if (document.title !== `${text} · vlm-dft`) document.querySelector("#spoken").textContent = text;
    document.title = `${text} · vlm-dft`;
  }

  /** Change the address without opening the page anew. */
  setParams(values) {
    for (const [name, value] of Object.entries(values)) value ? this.params.set(name, value) : this.params.delete(name);
    const path = location.hash.split("?")[0];
    history.replaceState(null, "", this.params.size ? `${path}?${this.params}` : path);
  }

  /** Run a step of the page; what it throws becomes the page. */
  async attempt(step) {
    try {
      await step();
    } catch (error) {
      if (!this.signal.aborted) this.fail(error);
    }
  }

  fail(error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) this.root.replaceChildren(askForKey(error));
    else this.root.replaceChildren(h("h1", null, "This page could not be shown"), failure(error, { title: "", retry: open }), h("p", null, h("a", { href: "#/" }, "Go to the queue")));
    if (error.status === 0) pause(3, this.signal).then(() => this.signal.aborted || this.attempt(this.render));
  }

  /** Do what somebody asked for; what the API says against it shows in place, and refused(error) may do more. */
  async ask(place, step, { title, refused } = {}) {
    try {
      show(place);
      await step();
    } catch (error) {
      if (this.signal.aborted) return;
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401) this.fail(error);
      else show(place, failure(error, { title }));
      refused?.(error);
    }
  }

  /** Run now and then again and again until it answers false or the page is left. A silent service is waited for. */
  async every(seconds, step) {
    for (let wait = seconds; !this.signal.aborted; ) {
      try {
        if (!document.hidden && (await step()) === false) return;
        wait = seconds;
      } catch (error) {
        if (this.signal.aborted) return;
        if (error.status !== 0 && error.status !== 429 && !(error.status >= 500)) return this.fail(error);
        wait = Math.min(10, wait * 1.5);
      }
      await pause(wait, this.signal);
    }
  }
}

/** So many seconds; less when the page is left, seen again after it was hidden, or the network comes back. */
function pause(seconds, signal) {
  return new Promise((resolve) => {
    const over = new AbortController();
    const end = () => { clearTimeout(timer); over.abort(); resolve(); };
    const timer = setTimeout(end, seconds * 1000);
    signal.addEventListener("abort", end, { signal: over.signal });
    addEventListener("online", end, { signal: over.signal });
    document.addEventListener("visibilitychange", () => document.hidden || end(), { signal: over.signal });
  });
}

function askForKey(error) {
  const input = h("input", { id: "key", type: "password", autocomplete: "current-password", required: true, "aria-describedby": "key-help" });
  const submit = (event) => {
    event.preventDefault();
    key.set(input.value.trim());
    open();
  };
  return h("form.card.narrow", { onsubmit: submit },
    h("h1", null, "This service asks for a key"),
    h("p.notice.bad", { role: "alert" }, key.get() ? error.message : "Enter an API key of your project."),
    h("label", { for: "key" }, "API key"), input,
    h("p.help", { id: "key-help" }, "It is kept in this browser tab only, until you close it. ", h("code", null, "vlm-dft keys create"), " makes one."),
    h("button.primary", { type: "submit" }, "Use this key"));
}

onConnection((is) => {
  const bar = document.querySelector("#connection");
  document.body.classList.toggle("lost", !is);
  bar.replaceChildren(...(is ? [] : [h("p", null, "The service does not answer. What you see may be old; jobs go on without this page. Trying again…")]));
});

const THEMES = { auto: ["Auto", "Colours: as the system has them"], light: ["Light", "Colours: light"], dark: ["Dark", "Colours: dark"] };
const themeButton = document.querySelector("#theme");

function useTheme(name) {
  document.documentElement.dataset.theme = name;
  themeButton.textContent = THEMES[name][0];
  themeButton.setAttribute("aria-label", THEMES[name][1]);
}

themeButton.addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
  localStorage.setItem("vlm-dft-theme", next);
  useTheme(next);
});

// Not by its address: what follows the # names a page here.
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });

useTheme(localStorage.getItem("vlm-dft-theme") ?? "auto");
addEventListener("hashchange", async () => { await open(); scrollTo(0, 0); main.focus({ preventScroll: true }); });
open();
