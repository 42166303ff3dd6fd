// LiteRT.js (XNNPACK in WebAssembly) in Node, one thread: run_litertjs.mjs NODE_MODULES compat|relaxed
// The relaxed build needs --experimental-wasm-relaxed-simd in Node 20. Its environment: `setup.sh FOLDER web`.
// The package is made for browsers; what it looks for there is supplied here.
import fs from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import vm from "node:vm";
import { serve } from "./worker.mjs";

const [modules, build] = process.argv.slice(2);
const folder = modules + "/@litertjs/core/";
const script = folder + "wasm/litert_wasm_" + (build === "compat" ? "compat_" : "") + "internal.js";
Object.assign(globalThis, {
  self: globalThis,
  require: createRequire(import.meta.url),
  importScripts: () => vm.runInThisContext(fs.readFileSync(script, "utf8") + ";globalThis.ModuleFactory=ModuleFactory;"),
  __dirname: folder + "wasm",
  __filename: script,
  Module: { locateFile: (file) => folder + "wasm/" + file },
});
const litert = await import(pathToFileURL(folder + "dist/index.js"));
await litert.loadLiteRt(script);

const array = ({ dtype, data }) => (dtype === "int64" ? Int32Array.from(data, Number) : data);

await serve(async (file, inputs) => {
  const model = await litert.loadAndCompile(new Uint8Array(fs.readFileSync(file)), { accelerator: "wasm" });
  const names = model.getInputDetails().map(({ name }) => name);
  const tensors = {};
  for (const input of inputs) {
    const name = names.find((item) => item.split(":")[0].endsWith(input.name)) ?? names[0];
    tensors[name] = litert.Tensor.fromTypedArray(array(input), input.shape);
  }
  return {
    run: async () => {
      const outputs = await model.run(tensors);
      const all = [];
      for (const output of Array.isArray(outputs) ? outputs : Object.values(outputs)) {
        all.push(Float32Array.from(output.toTypedArray ? output.toTypedArray() : await output.data()));
        output.delete();
      }
      return all;
    },
    drop: () => {
      Object.values(tensors).forEach((tensor) => tensor.delete?.());
      model.delete?.();
    },
  };
});
