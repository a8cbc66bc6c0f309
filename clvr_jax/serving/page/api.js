// Requests to the server, with the key if there is one, and server-sent events with resumption.

const KEY_NAME = "clvr-key";
const MAX_WAIT_MS = 8000;

export class ApiError extends Error {
  constructor(status, body, retryAfter = null) {
    super(body?.error?.message ?? `the server answered with status ${status}`);
    this.status = status;
    this.param = body?.error?.param ?? null;
    this.code = body?.error?.code ?? null;
    this.retryAfter = retryAfter;
  }
}

export class Api {
  /** onKeyNeeded: called when the server refuses the key. */
  constructor(onKeyNeeded) {
    this.onKeyNeeded = onKeyNeeded;
    this.images = new Map();
  }

  get key() {
    return sessionStorage.getItem(KEY_NAME) ?? "";
  }

  set key(value) {
    if (value) sessionStorage.setItem(KEY_NAME, value);
    else sessionStorage.removeItem(KEY_NAME);
  }

  async request(path, { method = "GET", body, headers = {}, signal } = {}) {
    const all = { ...headers };
    if (this.key) all.Authorization = `Bearer ${this.key}`;
    if (body !== undefined) all["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method, headers: all, body: body && JSON.stringify(body), signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { error: { message: "the server cannot be reached", code: "unreachable" } });
    }
    if (response.ok) return response;
    const found = await response.json().catch(() => null);
    if (response.status === 401) this.onKeyNeeded();
    throw new ApiError(response.status, found, response.headers.get("retry-after"));
  }

  async json(path, options) {
    return (await this.request(path, options)).json();
  }

  async blob(path) {
    return (await this.request(path)).blob();
  }

  /** Returns the URL of an image, which is loaded once. <img> cannot send the key, so it shows a blob. */
  imageUrl(imageId, kind = "png") {
    const name = `${imageId}.${kind}`;
    if (!this.images.has(name)) {
      const loading = this.blob(`/v1/images/${encodeURIComponent(name)}/content`).then((blob) => URL.createObjectURL(blob));
      loading.catch(() => this.images.delete(name));
      this.images.set(name, loading);
    }
    return this.images.get(name);
  }

  /** Calls onEvent for every event of a loop until it is done; a lost connection is resumed after the last event.
   *  onConnection(false) says that it is lost, onConnection(true) that it is back. */
  async follow(loopId, onEvent, onConnection, signal) {
    let last = null;
    for (let wait = 500; ; wait = Math.min(2 * wait, MAX_WAIT_MS)) {
      try {
        const headers = last === null ? {} : { "Last-Event-ID": String(last) };
        const response = await this.request(`/v1/loops/${encodeURIComponent(loopId)}/events`, { headers, signal });
        onConnection(true);
        for await (const event of readEvents(response.body)) {
          if (event.error) throw new ApiError(500, event);
          last = event.id;
          wait = 500;
          onEvent(event);
          if (event.type === "done") return;
        }
      } catch (error) {
        if (signal.aborted) return;
        if (error instanceof ApiError && error.status >= 400 && error.status < 500) throw error;
      }
      if (signal.aborted) return;
      onConnection(false);
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}

/** Yields the data of server-sent events; comments are skipped. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}
