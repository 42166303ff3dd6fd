// The loop that every peer in Node runs; requests and replies as in worker.py.
import fs from "node:fs";
import readline from "node:readline";

const ARRAYS = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, bool: Uint8Array };

function read({ name, dtype, shape, file }) {
  const bytes = fs.readFileSync(file);
  return { name, dtype, shape, data: new ARRAYS[dtype](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength)) };
}

// prepare(file, inputs) gives {run, drop}: run() gives typed arrays, drop() lets go of memory.
export async function serve(prepare) {
  const reply = (value) => fs.writeSync(1, JSON.stringify(value) + "\n");
  for (const name of ["log", "info", "warn", "debug"]) console[name] = (...all) => console.error(...all);
  const ready = {};
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const request = JSON.parse(line);
    try {
      reply(await answer(request, ready, prepare));
    } catch (error) {
      console.error(error);
      reply({ error: String(error?.stack ?? error).slice(0, 500) });
    }
  }
  process.exit(0);
}

async function answer(request, ready, prepare) {
  if (request.load) {
    const model = await prepare(request.file, request.inputs.map(read));
    let outputs;
    // Until the compiler that optimises is through with all functions.
    const end = performance.now() + 1500;
    for (let i = 0; i < 5 || performance.now() < end; i++) outputs = await model.run();
    fs.writeFileSync(request.result, Float32Array.from(outputs.flatMap((values) => Array.from(values, Number))));
    ready[request.load] = model;
    return {};
  }
  if (request.time) {
    const { run } = ready[request.time];
    await run(); // whoever ran before has filled the caches with its own data
    const seconds = [];
    for (let i = 0; i < request.runs; i++) {
      const start = performance.now();
      await run();
      seconds.push((performance.now() - start) / 1000);
    }
    return { seconds };
  }
  await ready[request.drop].drop();
  delete ready[request.drop];
  return {};
}
