// TensorFlow.js in Node, its WebAssembly backend with SIMD, one thread: run_tfjs.mjs NODE_MODULES
// Its environment: `setup.sh FOLDER web`. What it runs is written by `write_tfjs` in export.py.
import fs from "node:fs";
import { createRequire } from "node:module";
import { serve } from "./worker.mjs";

const require = createRequire(process.argv[2] + "/");
const tf = require("@tensorflow/tfjs/dist/tf.node.js");
const backend = require("@tensorflow/tfjs-backend-wasm/dist/tf-backend-wasm.node.js");
backend.setWasmPaths(process.argv[2] + "/@tensorflow/tfjs-backend-wasm/wasm-out/");
backend.setThreadsCount(1);
tf.env().set("WASM_HAS_MULTITHREAD_SUPPORT", false);
await tf.setBackend("wasm");
await tf.ready();

function load(file) {
  const bytes = fs.readFileSync(file);
  const end = bytes.indexOf(10);
  const steps = JSON.parse(bytes.subarray(0, end).toString());
  let at = end + 1;
  const taken = (entry) => {
    const size = entry.shape.reduce((a, b) => a * b, 4);
    const data = new Float32Array(bytes.buffer.slice(bytes.byteOffset + at, bytes.byteOffset + at + size));
    at += size;
    return tf.keep(tf.tensor(data, entry.shape));
  };
  // In the order in which they were written.
  for (const step of steps) for (const key of ["weight", "bias"]) if (step[key]) step[key] = taken(step[key]);
  return steps;
}

const OPERATORS = {
  conv2d: (x, y, s) => {
    const options = { x, filter: s.weight, strides: s.strides, pad: s.pad, bias: s.bias, activation: s.activation ?? "linear" };
    return s.depthwise ? tf.fused.depthwiseConv2d(options) : tf.fused.conv2d(options);
  },
  add: (x, y) => tf.add(x, y),
  relu: (x) => tf.relu(x),
  hardtanh: (x) => tf.relu6(x),
  max_pool2d: (x, y, s) => tf.maxPool(x, s.size, s.strides, s.pad),
  mean: (x) => tf.mean(x, [1, 2]),
  reshape: (x) => x,
  linear: (x, y, s) => tf.fused.matMul({ a: x, b: s.weight, bias: s.bias }),
};

function forward(steps, image) {
  return tf.tidy(() => {
    const values = [];
    for (const step of steps) {
      const value = (n) => (n < 0 ? image : values[n]);
      values.push(OPERATORS[step.op](value(step.x), value(step.y), step));
    }
    return values.at(-1);
  });
}

await serve(async (file, [{ data, shape }]) => {
  const steps = load(file);
  const image = tf.tidy(() => tf.keep(tf.transpose(tf.tensor(data, shape), [0, 2, 3, 1])));
  return {
    run: async () => {
      const result = forward(steps, image);
      const values = result.dataSync();
      result.dispose();
      return [values];
    },
    drop: () => [image, ...steps.flatMap((s) => [s.weight, s.bias])].forEach((t) => t?.dispose()),
  };
});
