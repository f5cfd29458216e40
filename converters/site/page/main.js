/** The page: the form's settings go to the worker, its image onto the canvas. */

const $ = id => document.getElementById(id);
const form = $("form"), fields = form.elements, canvas = $("canvas");
const STAGE_NAMES = {prior: "Composing", decoder: "Adding detail"};
const worker = new Worker(new URL("worker.js", import.meta.url), {type: "module"});
let shown = {}; // the settings of the image that is being generated or shown

const say = text => { $("status").textContent = text; };
const number = name => Number(fields[name].value);

function settings() {
  return {
    prompt: fields.prompt.value, negative: fields.negative.value,
    width: number("width"), height: number("height"), seed: number("seed"),
    prior: {steps: number("prior_steps"), guidance: number("prior_guidance")},
    decoder: {steps: number("decoder_steps"), guidance: number("decoder_guidance")},
  };
}

function busy(is) {
  $("generate").hidden = is;
  $("stop").hidden = !is;
  $("progress").hidden = !is;
  canvas.setAttribute("aria-busy", is);
}

const heard = {
  bytes({done, all}) {
    say(`Loading the model: ${(done / 1e6).toFixed(1)} of ${(all / 1e6).toFixed(1)} MB`);
    $("progress").hidden = false;
    $("progress").value = done / all;
  },
  ready({size: [width, height]}) {
    fields.width.value = width;
    fields.height.value = height;
    $("progress").hidden = true;
    $("generate").disabled = false;
    say("Ready. Everything is computed in this tab.");
  },
  step({stage, index, steps}) {
    const {prior, decoder} = shown, before = stage === "prior" ? 0 : prior.steps;
    say(`${STAGE_NAMES[stage]}: step ${index + 1} of ${steps}`);
    $("progress").value = (before + index + 1) / (prior.steps + decoder.steps);
  },
  image({width, height, pixels, seconds, left}) {
    [canvas.width, canvas.height] = [width, height];
    canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
    canvas.setAttribute("aria-label", shown.prompt);
    canvas.hidden = $("download").hidden = false;
    $("download").href = canvas.toDataURL("image/png");
    $("download").download = `${shown.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}-${shown.seed}.png`;
    busy(false);
    const cut = left ? ` The prompt was too long: its last ${left} tokens were left out.` : "";
    say(`Generated in ${seconds.toFixed(1)} seconds, seed ${shown.seed}.${cut}`);
  },
  error({text}) {
    busy(false);
    say(text);
  },
};

worker.onmessage = ({data: {kind, ...rest}}) => heard[kind](rest);
worker.onerror = event => heard.error({text: event.message || "The page's files could not be loaded."});

form.addEventListener("submit", event => {
  event.preventDefault();
  shown = settings();
  busy(true);
  $("progress").value = 0;
  worker.postMessage({kind: "generate", settings: shown});
});
$("stop").addEventListener("click", () => worker.postMessage({kind: "stop"}));
$("dice").addEventListener("click", () => { fields.seed.value = crypto.getRandomValues(new Uint32Array(1))[0]; });

fields.prompt.value = new URLSearchParams(location.search).get("prompt") ?? "";
say("Loading…");
