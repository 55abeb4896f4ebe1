// The served model: its name, and the fields of the form that depend on it.

import { addOption, byId } from "./dom.js";
import { KeyDeclined } from "./errors.js";
import { call, pause } from "./server.js";

// Tasks of the model; empty until it is known.
export let tasks = [];

// Tasks that take a strength.
export let tasksWithStrength = [];

// True unless the server sends no previews, because it blocks flagged images.
export let previews = true;

// Name of the model in requests; empty where the server has one model only, or is not known.
export let modelName = "";

// What the page shows of a model that no replica has described yet, by the state of its replicas.
const NOT_DESCRIBED = {
  at_zero: "it starts with the first request",
  failed: "it could not be started",
};

// Describe the model, and wait while it is loading. Of several, show the first that has run. Before
// one has, the first request starts the first model, which is described then.
export async function learnModel() {
  byId("enter-key").hidden = true;
  for (;;) {
    try {
      const response = await call("v1/models", {}, () => {
        byId("model").textContent = "The model is loading …";
      });
      const { data: models } = await response.json();
      const model = models.find((one) => one.tasks);
      if (model) {
        modelName = models.length > 1 ? model.id : "";
        showModel(model);
        return;
      }
      const first = models.find((one) => one.state !== "failed") ?? models[0];
      modelName = first.id;
      byId("model").textContent = `${first.id} · ${NOT_DESCRIBED[first.state] ?? "it is loading …"}`;
      await pause(3);
    } catch (error) {
      byId("model").textContent = error.message;
      if (error instanceof KeyDeclined) {
        byId("enter-key").hidden = false;
        return;
      }
      await pause(3);
    }
  }
}

byId("enter-key").addEventListener("click", learnModel);

// Whether the model edits images, with a mask or without.
export const takesImage = () => tasks.some((task) => task !== "text-to-image");

function showModel(model) {
  tasks = model.tasks;
  tasksWithStrength = Object.keys(model.default_strengths);
  previews = model.safety !== "block";
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
  byId("source").hidden = !takesImage();
  byId("drop").textContent =
    `${tasks.includes("text-to-image") ? "Start from an image" : "This model needs an image"}: drop, paste or choose one`;
  byId("strength-field").hidden = !tasksWithStrength.length;
  for (const id of ["mask", "mask-hint", "brush-field", "clear-mask"]) {
    byId(id).hidden = !tasks.includes("inpainting");
  }
  const optional = tasks.includes("image-to-image");
  byId("without-mask").textContent = optional
    ? "Without a mask, the whole image is regenerated."
    : "This model needs a mask.";
}

// Square, portrait and landscape sizes, from half to twice the pixels of the model's default.
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
