/** Generates images beside the page, which stays usable meanwhile. */

import {Cascade} from "./cascade.js";
import {Networks, STAGES} from "./networks.js";
import {Tokenizer} from "./tokenizer.js";

let stopped = false;

async function open() {
  const manifest = await json("cascade.json");
  const networks = new Networks(manifest, (done, all) => postMessage({kind: "bytes", done, all}));
  const tokenizer = new Tokenizer(await json(manifest.tokenizer));
  if (networks.keeps) for (const stage of STAGES) await networks.load(stage);
  postMessage({kind: "ready", size: manifest.default_size});
  return new Cascade(networks, tokenizer);
}

async function json(path) {
  const reply = await fetch(new URL(path, import.meta.url));
  if (!reply.ok) throw new Error(`${path}: the server answered ${reply.status}`);
  return reply.json();
}

async function afterStep(stage, index, steps) {
  postMessage({kind: "step", stage, index, steps});
  await new Promise(resume => setTimeout(resume)); // a request to stop arrives here
  if (stopped) throw new Error("Stopped.");
}

const fail = error => postMessage({kind: "error", text: error.message ?? String(error)});
const opened = open();
opened.catch(fail);

onmessage = async ({data: {kind, settings}}) => {
  stopped = kind === "stop";
  if (stopped) return;
  try {
    const cascade = await opened, began = performance.now();
    const image = await cascade.generate(settings, afterStep);
    postMessage({kind: "image", ...image, seconds: (performance.now() - began) / 1000});
  } catch (error) { fail(error); }
};
