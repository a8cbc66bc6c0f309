// Starts the page: key, server, form, history, and the loop that the address names.

import { Api } from "./api.js";
import { Compose } from "./compose.js";
import { find } from "./dom.js";
import { History } from "./history.js";
import { LoopView } from "./loop/loop_view.js";

const NARROW = matchMedia("(max-width: 62rem)");
const LOOP_ID = /^#(loop_[0-9a-f]{24})$/;
const HEALTH_MS = 2000;
const INPUT_FIELDS = ["mode", "seed", "size", "max_steps", "max_nfe", "max_seconds", "candidates", "num_inference_steps"];

const needsKey = document.body.dataset.needsKey === "true";
const api = new Api(() => askForKey("The server does not accept this key."));
let compose, history, view;

/** Opens the dialog for the key; the page starts again with it. */
function askForKey(message = "") {
  const dialog = find("key-dialog");
  find("key-error").textContent = message;
  if (!dialog.open) dialog.showModal();
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = find("key").value.trim();
  if (!key) return;
  api.key = key;
  find("key").value = "";
  find("key-dialog").close();
  start();
});
find("key-button").hidden = !needsKey;
find("key-button").addEventListener("click", () => askForKey());

/** On narrow screens the history comes after the loop, in the order of the keyboard as well. */
function arrange() {
  (NARROW.matches ? find("columns") : find("side")).append(find("history"));
}
NARROW.addEventListener("change", arrange);
arrange();

async function startLoop(body) {
  const { id } = await api.json("/v1/loops", { method: "POST", body });
  history.refresh();
  if (location.hash === `#${id}`) openFromAddress();
  else location.hash = id;
  if (NARROW.matches) find("main").scrollIntoView();
}

/** Returns the request of a loop, as POST /v1/loops takes it. */
async function requestOf(item) {
  const { data } = item.images === null ? { data: [] } : await api.json(`/v1/loops/${item.id}/input_images`);
  const body = { prompt: item.prompt, mode: item.mode };
  for (const name of INPUT_FIELDS) if (item.request[name] !== undefined) body[name] = item.request[name];
  if (data.length) body.images = data.map((image) => `data:image/png;base64,${image.b64_json}`);
  return body;
}

const actions = {
  async runAgain(item) {
    const { seed, ...body } = await requestOf(item); // a new seed, since the same one gives the same images
    await startLoop(body);
  },
  async edit(item) {
    compose.load({ ...(await requestOf(item)), seed: item.seed });
  },
  async copy(item) {
    await copyText(item.prompt);
    find("announcer").textContent = "The prompt is copied.";
  },
  async remove(item) {
    await api.request(`/v1/loops/${item.id}`, { method: "DELETE" });
    if (location.hash === `#${item.id}`) location.hash = "";
    await history.refresh(true);
  },
  changed: () => history.refresh(),
  open(id) {
    history.refresh();
    location.hash = id;
  },
};

/** The clipboard, which pages of insecure origins do not have; a field that is selected does as well. */
async function copyText(text) {
  if (navigator.clipboard && isSecureContext) {
    try { await navigator.clipboard.writeText(text); return; } catch { /* not allowed */ }
  }
  const field = Object.assign(document.createElement("textarea"), { value: text, className: "hidden" });
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

async function openFromAddress() {
  const id = LOOP_ID.exec(location.hash)?.[1] ?? null;
  history.select(id);
  if (id === null) { view.close(); return; }
  try {
    await view.open(id);
  } catch (error) {
    find("form-error").textContent = error.message;
  }
}


async function start() {
  if (needsKey && !api.key) { askForKey(); return; }
  let server;
  try {
    server = await api.json("/v1/server");
  } catch (error) {
    find("server").textContent = error.status === 401 ? "" : error.message;
    if (error.status !== 401) setTimeout(start, HEALTH_MS);
    return;
  }
  find("server").textContent = server.model;
  compose ??= new Compose(server, startLoop);
  history ??= new History(api, actions);
  if (!view) {
    view = new LoopView(api, server, actions);
    window.addEventListener("hashchange", openFromAddress);
  }
  history.refresh(true);
  openFromAddress();
  document.body.dataset.isReady = "true";
}

start();
