// The image to start from, and the mask brushed over it.

import { announce, byId } from "./dom.js";
import { takesImage, tasks } from "./model.js";

const fileInput = byId("file");
const sourceImage = byId("source-image");
const maskCanvas = byId("mask");
export const strength = byId("strength");

// {file, brushed, shown}: the file, whether it has a mask, and when it is on display.
export let source = null;

export function startFrom(file, mask = null) {
  if (!file?.type.startsWith("image/") || !takesImage()) return;
  URL.revokeObjectURL(sourceImage.src);
  const started = (source = { file, brushed: false });
  sourceImage.src = URL.createObjectURL(file);
  started.shown = showSource(started, mask).catch(() => {
    if (source !== started) return; // another one replaced it
    removeSource();
    announce("The browser cannot read this file as an image.");
  });
  byId("drop").hidden = true;
  byId("editor").hidden = false;
}

// The source, unless the chosen model takes none; then it waits for another model.
export const sourceInUse = () => (takesImage() ? source : null);

// Task of a request with this source.
export function taskOfSource() {
  if (!sourceInUse()) return "text-to-image";
  return source.brushed ? "inpainting" : "image-to-image";
}

// What the model needs and does not have, or null: {message, field}.
export function missingInput() {
  if (!tasks.length || tasks.includes(taskOfSource())) return null;
  if (!source) return { message: "This model needs an image: drop, paste or choose one.", field: fileInput };
  return source.brushed
    ? { message: "This model takes no mask: remove the image, and start from it again.", field: fileInput }
    : { message: "This model needs a mask: brush over the area to regenerate.", field: maskCanvas };
}

async function showSource(started, mask) {
  await sourceImage.decode();
  const brushed = mask && (await createImageBitmap(mask));
  if (source !== started) return;
  // The mask has the size of the file, pixel by pixel.
  maskCanvas.width = sourceImage.naturalWidth;
  maskCanvas.height = sourceImage.naturalHeight;
  Object.assign(cursor, { x: maskCanvas.width / 2, y: maskCanvas.height / 2 });
  showCursor();
  if (!brushed) return;
  // Convert the output of `maskFile` back to brush strokes.
  const pen = maskCanvas.getContext("2d");
  pen.fillStyle = brushColor();
  pen.fillRect(0, 0, maskCanvas.width, maskCanvas.height);
  pen.globalCompositeOperation = "destination-out";
  pen.drawImage(brushed, 0, 0);
  pen.globalCompositeOperation = "source-over";
  started.brushed = true;
}

export function removeSource() {
  source = null;
  URL.revokeObjectURL(sourceImage.src);
  sourceImage.removeAttribute("src");
  fileInput.value = "";
  setStrength(null);
  byId("drop").hidden = false;
  byId("editor").hidden = true;
}

// Null means the model's default.
export function setStrength(value) {
  strength.dataset.touched = value === null ? "" : "yes";
  strength.value = value ?? strength.defaultValue;
  byId("strength-shown").value = value ?? "model default";
}

function clearMask() {
  if (source) source.brushed = false;
  maskCanvas.getContext("2d").clearRect(0, 0, maskCanvas.width, maskCanvas.height);
}

const brushColor = () => getComputedStyle(document.documentElement).getPropertyValue("--brush");

// Brush through points, in pixels of the mask.
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

// Position of the keyboard's brush, in pixels of the mask.
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

// Make the mask: opaque, and transparent where it was brushed, the part to generate anew.
export function maskFile() {
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
