"use strict";

// ---- the server ---------------------------------------------------------------------------------

const RETRIES = 5;

class ServerError extends Error {
  constructor(message, param) {
    super(message);
    this.param = param;
  }
}

// The key dialog was dismissed: it does not open again by itself.
class KeyRefused extends ServerError {}

const pause = (seconds, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });

async function errorOf(response) {
  try {
    const { error } = await response.json();
    return new ServerError(error.message, error.param);
  } catch {
    return new ServerError(`The server answered ${response.status} ${response.statusText}.`, null);
  }
}

// Opens the key dialog on 401, and retries after Retry-After on 429 and 503.
async function call(path, options = {}, onWait = () => {}) {
  for (let attempt = 0; ; attempt += 1) {
    const key = sessionStorage.getItem("key");
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server cannot be reached.", null);
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status === 401) {
      // Another call may have been given a key in the meantime.
      if (key === sessionStorage.getItem("key")) await askForKey(key ? error.message : "");
      options.signal?.throwIfAborted();
      continue;
    }
    const seconds = Number(response.headers.get("Retry-After"));
    if (![429, 503].includes(response.status) || !seconds || attempt >= RETRIES) throw error;
    for (let left = seconds; left > 0; left -= 1) {
      onWait(`${error.message} Trying again in ${left} s.`);
      await pause(Math.min(1, left), options.signal);
    }
  }
}

// The data of server-sent events. Comments, which keep the connection alive, have none.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text = (text + value).replaceAll("\r\n", "\n");
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const lines = text.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield JSON.parse(lines.map((line) => line.slice(5)).join("\n"));
    }
  }
}

// ---- the document -------------------------------------------------------------------------------

const byId = (id) => document.getElementById(id);
const form = byId("form");
const fileInput = byId("file");
const sourceImage = byId("source-image");
const maskCanvas = byId("mask");
const strength = byId("strength");

const announce = (text) => {
  byId("news").textContent = text;
};

// Browsers keep the clipboard from pages that came over plain http from another machine.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const area = Object.assign(document.createElement("textarea"), { className: "quiet", value: text });
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

function addOption(select, value, text = value) {
  select.append(new Option(text, value));
}

// Resolves when there is a key to try with.
let keyQuestion = null;
function askForKey(reason) {
  byId("key-reason").textContent = reason;
  if (!keyQuestion) {
    const dialog = byId("key-dialog");
    keyQuestion = new Promise((resolve, reject) => {
      byId("key-form").onsubmit = (event) => {
        event.preventDefault();
        sessionStorage.setItem("key", byId("key").value.trim());
        dialog.close("given");
      };
      dialog.onclose = () => {
        keyQuestion = null;
        if (dialog.returnValue === "given") {
          resolve();
          if (!byId("enter-key").hidden) learnModel();
        } else reject(new KeyRefused("This server asks for an API key.", null));
        dialog.returnValue = "";
        byId("key").value = "";
        byId("key").setCustomValidity("");
      };
      dialog.showModal();
    });
  }
  return keyQuestion;
}
byId("no-key").addEventListener("click", () => byId("key-dialog").close());
byId("key").addEventListener("input", ({ target }) => {
  const sendable = /^[\x21-\x7e]*$/.test(target.value.trim()); // as a header
  target.setCustomValidity(sendable ? "" : "A key has only ASCII letters, digits and signs, and no spaces.");
});

// ---- the model ----------------------------------------------------------------------------------

let tasks = [];

async function learnModel() {
  byId("enter-key").hidden = true;
  for (;;) {
    try {
      const response = await call("v1/models", {}, () => {
        byId("model").textContent = "The model is being loaded …";
      });
      const { data: [model] } = await response.json();
      showModel(model);
      return;
    } catch (error) {
      byId("model").textContent = error.message;
      if (error instanceof KeyRefused) {
        byId("enter-key").hidden = false;
        return;
      }
      await pause(3);
    }
  }
}

byId("enter-key").addEventListener("click", learnModel);

function showModel(model) {
  tasks = model.tasks;
  byId("model").textContent = `${model.id} · ${model.pipeline}`;
  for (const [width, height] of sizesOf(model)) {
    addOption(byId("size"), `${width}x${height}`, `${width} × ${height}`);
  }
  const steps = byId("num_inference_steps");
  steps.max = model.max_steps;
  steps.placeholder = model.default_steps;
  byId("prompt").maxLength = model.max_prompt_chars;
  for (const name of model.schedulers) addOption(byId("scheduler"), name);
  for (const name of model.loras) addOption(byId("lora"), name);
  byId("negative-field").hidden = !model.takes_negative_prompt;
  byId("scheduler-field").hidden = !model.schedulers.length;
  byId("lora-fields").hidden = !model.loras.length;
  byId("source").hidden = !tasks.includes("image-to-image");
  for (const id of ["mask", "mask-hint", "brush-field", "clear-mask"]) {
    byId(id).hidden = !tasks.includes("inpainting");
  }
}

// Square, upright and lying ones, of half the model's own pixels to twice as many.
function sizesOf(model) {
  const [width, height] = model.default_size.split("x").map(Number);
  const snap = (side) => Math.max(1, Math.round(side / model.size_multiple)) * model.size_multiple;
  const sizes = [];
  for (const scale of [1, Math.SQRT1_2, Math.SQRT2]) {
    for (const shape of [1, Math.sqrt(2 / 3), Math.sqrt(3 / 2)]) {
      sizes.push([snap(width * scale * shape), snap((height * scale) / shape)]);
    }
  }
  const fits = ([w, h]) => w * h <= model.max_pixels && Math.max(w, h) <= model.max_side;
  return [...new Map(sizes.filter(fits).map((size) => [size.join("x"), size])).values()];
}

// ---- the image to start from --------------------------------------------------------------------

let source = null; // {file, brushed, shown}

function startFrom(file, mask = null) {
  if (!file?.type.startsWith("image/") || !tasks.includes("image-to-image")) return;
  URL.revokeObjectURL(sourceImage.src);
  const started = (source = { file, brushed: false });
  sourceImage.src = URL.createObjectURL(file);
  started.shown = showSource(started, mask).catch(() => {
    if (source !== started) return; // another one came meanwhile
    removeSource();
    announce("The browser cannot read this file as an image.");
  });
  byId("drop").hidden = true;
  byId("editor").hidden = false;
}

async function showSource(started, mask) {
  await sourceImage.decode();
  const brushed = mask && (await createImageBitmap(mask));
  if (source !== started) return;
  // As wide and high as the file, so that a mask fits it pixel by pixel.
  maskCanvas.width = sourceImage.naturalWidth;
  maskCanvas.height = sourceImage.naturalHeight;
  Object.assign(cursor, { x: maskCanvas.width / 2, y: maskCanvas.height / 2 });
  showCursor();
  if (!brushed) return;
  // What `maskFile` made, back into what was brushed.
  const pen = maskCanvas.getContext("2d");
  pen.fillStyle = brushColor();
  pen.fillRect(0, 0, maskCanvas.width, maskCanvas.height);
  pen.globalCompositeOperation = "destination-out";
  pen.drawImage(brushed, 0, 0);
  pen.globalCompositeOperation = "source-over";
  started.brushed = true;
}

function removeSource() {
  source = null;
  URL.revokeObjectURL(sourceImage.src);
  sourceImage.removeAttribute("src");
  fileInput.value = "";
  setStrength(null);
  byId("drop").hidden = false;
  byId("editor").hidden = true;
}

// Null: the model's own.
function setStrength(value) {
  strength.dataset.touched = value === null ? "" : "yes";
  strength.value = value ?? strength.defaultValue;
  byId("strength-shown").value = value ?? "the model's own";
}

function clearMask() {
  if (source) source.brushed = false;
  maskCanvas.getContext("2d").clearRect(0, 0, maskCanvas.width, maskCanvas.height);
}

const brushColor = () => getComputedStyle(document.documentElement).getPropertyValue("--brush");

// Through points in pixels of the mask.
function stroke(points) {
  const pen = maskCanvas.getContext("2d");
  pen.strokeStyle = brushColor();
  pen.lineCap = pen.lineJoin = "round";
  pen.lineWidth = (byId("brush").value / 100) * maskCanvas.width;
  pen.beginPath();
  pen.moveTo(...points[0]);
  for (const point of points) pen.lineTo(...point);
  pen.stroke();
  source.brushed = true;
}

function brush(event) {
  if (!event.buttons || !source) return;
  event.preventDefault();
  const box = maskCanvas.getBoundingClientRect();
  const scale = maskCanvas.width / box.width;
  const at = (point) => [(point.clientX - box.left) * scale, (point.clientY - box.top) * scale];
  stroke([brush.last ?? at(event), ...(event.getCoalescedEvents?.() ?? []).map(at), at(event)]);
  brush.last = at(event);
}

// The keyboard's brush, in pixels of the mask.
const cursor = { x: 0, y: 0, down: false };
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function showCursor() {
  const { style, classList } = byId("cursor");
  style.left = `${(100 * cursor.x) / maskCanvas.width}%`;
  style.top = `${(100 * cursor.y) / maskCanvas.height}%`;
  style.width = `${byId("brush").value}%`;
  classList.toggle("down", cursor.down);
}

function brushByKey(event) {
  const arrow = ARROWS[event.key];
  if (!source || (!arrow && event.key !== " ")) return;
  event.preventDefault();
  const from = [cursor.x, cursor.y];
  if (arrow) {
    const [x, y] = arrow.map((side) => (side * maskCanvas.width) / 50);
    cursor.x = Math.min(maskCanvas.width, Math.max(0, cursor.x + x));
    cursor.y = Math.min(maskCanvas.height, Math.max(0, cursor.y + y));
  } else if (!event.repeat) {
    cursor.down = !cursor.down;
    announce(cursor.down ? "The brush is down." : "The brush is up.");
  }
  if (cursor.down) stroke([from, [cursor.x, cursor.y]]);
  showCursor();
}

// Opaque, and transparent where it was brushed: the part to generate anew.
function maskFile() {
  const mask = new OffscreenCanvas(maskCanvas.width, maskCanvas.height);
  const pen = mask.getContext("2d");
  pen.fillRect(0, 0, mask.width, mask.height);
  pen.globalCompositeOperation = "destination-out";
  pen.drawImage(maskCanvas, 0, 0);
  return mask.convertToBlob({ type: "image/png" });
}

fileInput.addEventListener("change", () => startFrom(fileInput.files[0]));
byId("clear-mask").addEventListener("click", clearMask);
byId("remove-source").addEventListener("click", removeSource);
strength.addEventListener("input", () => setStrength(strength.value));
maskCanvas.addEventListener("pointerdown", (event) => {
  brush.last = null;
  maskCanvas.setPointerCapture(event.pointerId);
  brush(event);
});
maskCanvas.addEventListener("pointermove", brush);
maskCanvas.addEventListener("keydown", brushByKey);
maskCanvas.addEventListener("blur", () => {
  cursor.down = false;
  showCursor();
});
byId("brush").addEventListener("input", showCursor);
document.addEventListener("paste", (event) => startFrom(event.clipboardData.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
document.addEventListener("dragleave", () => byId("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  startFrom(event.dataTransfer.files[0]);
});

// ---- what to generate ---------------------------------------------------------------------------

const NUMBERS = ["num_inference_steps", "guidance_scale", "seed", "strength"];

// {fields, image, mask}: everything that generates the same image again, except a random seed.
async function wanted() {
  await source?.shown;
  const fields = {};
  for (const name of ["prompt", "size", "negative_prompt", "scheduler", ...NUMBERS]) {
    const value = form.elements[name].value;
    if (value !== "") fields[name] = NUMBERS.includes(name) ? Number(value) : value;
  }
  if (!source || !strength.dataset.touched) delete fields.strength;
  const lora = form.elements.lora.value;
  if (lora) fields.lora = { [lora]: Number(byId("lora-scale").value) };
  return {
    fields,
    image: source?.file ?? null,
    mask: source?.brushed ? await maskFile() : null,
  };
}

function fill({ fields, image, mask }) {
  for (const name of ["prompt", "size", "negative_prompt", "scheduler", ...NUMBERS]) {
    const field = form.elements[name];
    if (name === "size" && ![...field.options].some((option) => option.value === fields.size)) {
      if (fields.size) addOption(field, fields.size, fields.size.replace("x", " × "));
    }
    if (name !== "strength") field.value = fields[name] ?? "";
  }
  if (image) startFrom(image, mask);
  else removeSource();
  setStrength(fields.strength ?? null);
  const [[lora, scale]] = [...Object.entries(fields.lora ?? {}), ["", 1]];
  form.elements.lora.value = lora;
  byId("lora-scale").value = scale;
}

const LIVE = { stream: true, progress: true, partial_images: 3 };

function send({ fields, image, mask }, signal, onWait) {
  if (!image) {
    const body = JSON.stringify({ ...fields, ...LIVE });
    const headers = { "Content-Type": "application/json" };
    return call("v1/images/generations", { method: "POST", headers, body, signal }, onWait);
  }
  const body = new FormData();
  for (const [name, value] of Object.entries({ ...fields, ...LIVE })) {
    body.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  body.append("image", image, image.name || "image");
  if (mask) body.append("mask", mask, "mask.png");
  return call("v1/images/edits", { method: "POST", body, signal }, onWait);
}

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

function curl({ fields, image, mask }) {
  const lines = [`curl -sS ${quoted(new URL(image ? "v1/images/edits" : "v1/images/generations", location.href))}`];
  if (sessionStorage.getItem("key")) lines.push('-H "Authorization: Bearer $KEY"');
  if (!image) {
    lines.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(fields))}`);
  } else {
    const name = (image.name || "image.png").replaceAll(/[\\"]/g, "\\$&");
    lines.push(`-F ${quoted(`image=@"${name}"`)}`);
    if (mask) lines.push("-F mask=@mask.png");
    for (const [name, value] of Object.entries(fields)) {
      const text = typeof value === "object" ? JSON.stringify(value) : value;
      lines.push(`--form-string ${quoted(`${name}=${text}`)}`);
    }
  }
  return lines.join(" \\\n  ");
}

// ---- one image during generation ----------------------------------------------------------------

const running = []; // cards, oldest first

class Card {
  constructor(request) {
    this.request = request;
    this.abort = new AbortController();
    this.root = byId("card").content.firstElementChild.cloneNode(true);
    this.part = (selector) => this.root.querySelector(selector);
    this.part(".prompt").textContent = request.fields.prompt ?? "";
    this.part(".cancel").onclick = () => this.abort.abort();
    this.part(".reuse").onclick = () => {
      fill(this.request);
      form.elements.prompt.focus();
    };
    this.part(".again").onclick = () => {
      const { seed, ...fields } = this.request.fields;
      generate({ ...this.request, fields });
    };
    this.part(".curl").onclick = async () => {
      const copied = await copy(curl(this.request));
      this.say(copied ? "Copied." : "The browser lets nothing be copied.");
      announce(this.part(".state").textContent);
    };
    byId("empty").hidden = true;
    byId("gallery").prepend(this.root);
  }

  say(text) {
    this.part(".state").textContent = text;
  }

  show({ b64_json, output_format, size }) {
    const image = this.part("img");
    image.src = `data:image/${output_format};base64,${b64_json}`;
    image.alt = this.request.fields.prompt;
    image.hidden = false;
    const canvas = this.part(".canvas");
    canvas.classList.add("seen");
    canvas.style.aspectRatio = size.replace("x", " / ");
  }

  progress({ step, total_steps, queue_position, eta_s }) {
    const bar = this.part("progress");
    bar.max = total_steps;
    bar.value = step;
    const left = eta_s >= 1 ? ` · ${Math.ceil(eta_s)} s left` : "";
    const before = queue_position ? `${queue_position} before you` : "next";
    const denoising = `step ${step} of ${total_steps}`;
    this.say(`${queue_position === null ? denoising : `waiting, ${before}`}${left}`);
  }

  completed(event) {
    this.show(event);
    const { fields, image, mask } = this.request;
    const steps = this.part("progress").max;
    fields.seed = event.seed;
    const total = event.timings.total_s.toFixed(1);
    this.part(".facts").textContent =
      `${event.size.replace("x", " × ")} · ${steps} steps · seed ${event.seed} · ${total} s`;
    const warnings = this.part(".warnings");
    for (const text of event.warnings) {
      warnings.append(Object.assign(document.createElement("li"), { textContent: text }));
    }
    warnings.hidden = !event.warnings.length;
    const download = this.part(".download");
    download.href = this.part("img").src;
    download.download = `${event.seed}.${event.output_format}`;
    for (const selector of [".download", ".curl"]) this.part(selector).hidden = false;
    if (image && mask) {
      const link = this.part(".download-mask");
      link.href = URL.createObjectURL(mask);
      link.download = "mask.png"; // what the copied command names
      link.hidden = false;
    }
    this.end("done", "");
    announce(`Finished: ${fields.prompt}`);
  }

  end(how, text) {
    this.root.classList.remove("generating");
    this.root.classList.add(how);
    this.say(text);
    this.part("progress").hidden = true;
    this.part(".cancel").hidden = true;
    for (const selector of [".reuse", ".again"]) this.part(selector).hidden = false;
    running.splice(running.indexOf(this), 1);
  }

  async run() {
    running.push(this);
    this.root.classList.add("generating");
    this.say("sent");
    try {
      const response = await send(this.request, this.abort.signal, (text) => this.say(text));
      for await (const event of eventsOf(response)) {
        if (event.error) throw new ServerError(event.error.message, event.error.param);
        if (event.type.endsWith(".progress")) this.progress(event);
        else if (event.type.endsWith(".partial_image")) this.show(event);
        else this.completed(event);
      }
      if (this.root.classList.contains("generating")) throw new ServerError("The connection was lost.", null);
    } catch (error) {
      if (this.abort.signal.aborted) {
        this.end("cancelled", "Cancelled.");
        announce("Cancelled.");
      } else {
        this.end("failed", error.message);
        announce(error.message);
        blame(error.param, error.message);
      }
    }
  }
}

function generate(request) {
  new Card(request).run();
}

// ---- the form -----------------------------------------------------------------------------------

function blame(param, message) {
  const [name] = param?.split(".") ?? []; // of lora.ink the first
  const field = form.elements[name];
  if (!field?.after) return;
  byId(`${name}-wrong`)?.remove();
  const text = Object.assign(document.createElement("p"), { className: "wrong", textContent: message });
  text.id = `${name}-wrong`;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", text.id);
  field.closest("details")?.setAttribute("open", "");
  field.after(text);
}

function forgive() {
  for (const text of form.querySelectorAll(".wrong")) text.remove();
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  forgive();
  const wrong = [...form.elements].find((field) => !field.validity.valid);
  if (!form.elements.prompt.value.trim()) {
    blame("prompt", "Describe the image.");
    form.elements.prompt.focus();
  } else if (wrong) {
    blame(wrong.name, wrong.validationMessage);
    wrong.focus();
  } else {
    generate(await wanted());
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  if (event.key === "Escape" && !byId("key-dialog").open) running.at(-1)?.abort.abort();
});

learnModel();
