// Times a wasm bundle and onnxruntime-web (one thread, SIMD) in one Node process, in turns; prints JSON.
//   node latency.mjs request.json      {"bundle": .mjs, "onnx": file or null, "inputs": [{name, dtype, shape, file}], "seconds": s}
import fs from "node:fs";
import { pathToFileURL } from "node:url";

const ARRAYS = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, bool: Uint8Array };
const request = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const inputs = {};
for (const { name, dtype, file } of request.inputs) {
  const bytes = fs.readFileSync(file);
  inputs[name] = new ARRAYS[dtype](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
}

const engines = {};
const { load } = await import(pathToFileURL(request.bundle));
const model = await load();
engines.graphopt = async () => Object.values(model.run(inputs))[0];

if (request.onnx) {
  const folder = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url);
  const ort = await import(new URL("ort.wasm.min.mjs", folder));
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = folder.href;
  ort.env.logLevel = "error";
  ort.env.wasm.wasmBinary = fs.readFileSync(new URL("ort-wasm-simd-threaded.wasm", folder));
  const session = await ort.InferenceSession.create(new Uint8Array(fs.readFileSync(request.onnx)), {
    executionProviders: ["wasm"], graphOptimizationLevel: "all",
  });
  const feeds = {};
  request.inputs.forEach(({ name, dtype, shape }) => { feeds[name] = new ort.Tensor(dtype, inputs[name], shape); });
  engines["onnxruntime-web"] = async () => Object.values(await session.run(feeds))[0].data;
}

const samples = {}, first = {};
for (const [name, run] of Object.entries(engines)) {
  samples[name] = [];
  first[name] = Float64Array.from(await run(), Number);
  await run();
}
const end = performance.now() + 1000 * request.seconds * Object.keys(engines).length;
for (let turn = 0; turn < 3 || performance.now() < end; turn++) {
  for (const [name, run] of Object.entries(engines)) {
    await run();  // the engine before has filled the caches with its own data
    for (let i = 0; i < 3; i++) {
      const start = performance.now();
      await run();
      samples[name].push(performance.now() - start);
    }
  }
}
const result = {};
for (const [name, times] of Object.entries(samples)) {
  times.sort((a, b) => a - b);
  const difference = first[name].reduce((most, v, i) => Math.max(most, Math.abs(v - first.graphopt[i])), 0);
  result[name] = { runs: times.length, min_ms: times[0], median_ms: times[times.length >> 1], difference };
}
console.log(JSON.stringify(result));
