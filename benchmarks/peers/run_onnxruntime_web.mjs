// onnxruntime-web in Node, its WebAssembly provider, one thread: run_onnxruntime_web.mjs NODE_MODULES
// Its environment: `setup.sh FOLDER web`.
import fs from "node:fs";
import { pathToFileURL } from "node:url";
import { serve } from "./worker.mjs";

const folder = pathToFileURL(process.argv[2] + "/onnxruntime-web/dist/");
const ort = await import(new URL("ort.wasm.min.mjs", folder));
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = folder.href;
ort.env.logLevel = "error";
ort.env.wasm.wasmBinary = fs.readFileSync(new URL("ort-wasm-simd-threaded.wasm", folder));

await serve(async (file, inputs) => {
  const options = { executionProviders: ["wasm"], graphOptimizationLevel: "all" };
  const session = await ort.InferenceSession.create(new Uint8Array(fs.readFileSync(file)), options);
  const feeds = {};
  inputs.forEach(({ dtype, shape, data }, i) => { feeds[session.inputNames[i]] = new ort.Tensor(dtype, data, shape); });
  return {
    run: async () => Object.values(await session.run(feeds)).map((output) => output.data),
    drop: () => session.release(),
  };
});
