// Runs a bundle's loader for graphopt: `node run.mjs LOADER` says the sizes of the model's memory, or an error. Then comes
// one JSON request a line on standard input, one reply a line.
//   {"inputs": {name: file}, "outputs": {name: file}}    run once, write the outputs
//   {"inputs": {name: file}, "seconds": s}               run for s seconds; the reply has the seconds of each run
import { readFileSync, writeFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const ARRAYS = {
  float32: Float32Array, float64: Float64Array, float16: Uint16Array, bfloat16: Uint16Array, int64: BigInt64Array,
  int32: Int32Array, int16: Int16Array, int8: Int8Array, uint8: Uint8Array, bool: Uint8Array,
};
const reply = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);
let model;

function answer({ inputs, outputs, seconds }) {
  const arrays = {};
  for (const { name, dtype } of model.inputs) {
    const bytes = readFileSync(inputs[name]);
    arrays[name] = new ARRAYS[dtype](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  }
  if (seconds === undefined) {
    const results = model.run(arrays);
    for (const [name, file] of Object.entries(outputs)) writeFileSync(file, results[name]);
    return {};
  }
  const taken = [];
  const end = performance.now() + 1000 * seconds;
  do {
    const start = performance.now();
    model.run(arrays);
    taken.push((performance.now() - start) / 1000);
  } while (performance.now() < end);
  return { taken };
}

try {
  const { load } = await import(pathToFileURL(process.argv[2]));
  model = await load();
  reply({ workspaceBytes: model.workspaceBytes, weightsBytes: model.weightsBytes });
} catch (error) {
  reply({ error: error.message });
  process.exit(1);
}
for await (const line of createInterface({ input: process.stdin })) {
  try {
    reply(answer(JSON.parse(line)));
  } catch (error) {
    reply({ error: error.message });
  }
}
