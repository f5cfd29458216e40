/** The networks of the bundle as sessions of onnxruntime-web, which computes on the CPU in WebAssembly. */

import * as ort from "./onnxruntime-web/ort.wasm.bundle.min.mjs";

export const STAGES = ["text_encoder", "prior", "decoder", "vqgan"];
const KEPT_BYTES = 600e6; // of all weights; larger networks are in memory one at a time
const here = path => new URL(path, import.meta.url).href;

ort.env.wasm.wasmPaths = {wasm: here("onnxruntime-web/ort-wasm-simd-threaded.wasm")};
ort.env.logLevel = "error";

export class Networks {
  #sessions = new Map();

  /** `manifest` is the content of cascade.json; `onBytes(done, all)` is called while files arrive. */
  constructor(manifest, onBytes) {
    this.manifest = manifest;
    this.total = STAGES.reduce((sum, stage) => sum + bytesOf(manifest.stages[stage]), 0);
    this.keeps = this.total <= KEPT_BYTES;
    this.done = 0;
    this.onBytes = onBytes;
  }

  /** The size of an axis of an input port that has a fixed size. */
  size(stage, port, axis) {
    return this.#ports(stage).find(({name}) => name === port).dims[axis];
  }

  async load(stage) {
    if (!this.#sessions.has(stage)) this.#sessions.set(stage, await this.#open(stage));
    return this.#sessions.get(stage);
  }

  /** Run a stage on {port: [data, dims]}; returns the data of its outputs by port. */
  async run(stage, inputs) {
    const session = await this.load(stage);
    const feeds = Object.fromEntries(Object.entries(inputs).map(([name, [data, dims]]) => [name, tensor(data, dims)]));
    const outputs = await session.run({...this.#noControl(stage, inputs), ...feeds});
    return Object.fromEntries(Object.entries(outputs).map(([name, {data}]) => [name, data]));
  }

  /** Take a stage out of memory, unless all fit there. */
  async leave(stage) {
    if (this.keeps) return;
    await this.#sessions.get(stage).release();
    this.#sessions.delete(stage);
    this.done -= bytesOf(this.manifest.stages[stage]);
  }

  #ports(stage) {
    return this.manifest.stages[stage].graphs.model.inputs;
  }

  /** Zeros for the inputs of a ControlNet, which change nothing. */
  #noControl(stage, inputs) {
    const batch = Object.values(inputs)[0][1][0];
    const ports = this.#ports(stage).filter(({name}) => name.startsWith("control."));
    return Object.fromEntries(ports.map(({name, dims}) => {
      const shape = [batch, dims[1], 1, 1];
      return [name, tensor(new Float32Array(batch * dims[1]), shape)];
    }));
  }

  async #open(stage) {
    const {files, graphs} = this.manifest.stages[stage];
    const contents = await Promise.all(files.map(file => this.#fetch(file)));
    const graph = contents[files.findIndex(({path}) => path === graphs.model.path)];
    const externalData = files
      .map(({path}, i) => ({path: path.slice(path.lastIndexOf("/") + 1), data: contents[i]}))
      .filter(({data}) => data !== graph);
    return ort.InferenceSession.create(graph, {externalData, executionProviders: ["wasm"]});
  }

  async #fetch({path, bytes}) {
    const reply = await fetch(here(path));
    if (!reply.ok) throw new Error(`${path}: the server answered ${reply.status}`);
    const content = new Uint8Array(bytes), reader = reply.body.getReader();
    let at = 0;
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      if (at + part.value.length <= bytes) content.set(part.value, at);
      at += part.value.length;
      this.onBytes(this.done += part.value.length, this.total);
    }
    if (at !== bytes) throw new Error(`${path}: expected ${bytes} bytes, the server sent ${at}`);
    return content;
  }
}

const bytesOf = ({files}) => files.reduce((sum, {bytes}) => sum + bytes, 0);

function tensor(data, dims) {
  return new ort.Tensor(data instanceof BigInt64Array ? "int64" : "float32", data, dims);
}
