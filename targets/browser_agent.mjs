/**
 * Answers one request of Potstill in a browser; requests and replies are those of agent.py, which says what they hold.
 *
 * The page takes the request and starts workers, in each a runtime of its own, since a runtime has one number of
 * threads. Memory is WebAssembly's, which grows in steps and never shrinks, so that its size is its peak. Times are in
 * ms, memory in MB (10^6 bytes).
 */

const PROFILED_RUNS = 20;
const PROVIDERS = { CPUExecutionProvider: "wasm", WebGpuExecutionProvider: "webgpu" };
const ARRAYS = {
  float16: Uint16Array, float32: Float32Array, float64: Float64Array, bool: Uint8Array,
  int8: Int8Array, int16: Int16Array, int32: Int32Array, int64: BigInt64Array,
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, uint64: BigUint64Array,
};
const TASKS = { measure, turns, sustained, throughput, answer };

let ort, present, baseline, gpu;
let printed = () => {};

if (typeof document === "undefined") {
  self.onmessage = ({ data: { task, request } }) =>
    start(request)
      .then(() => TASKS[task](request))
      .then((value) => self.postMessage({ value: { ...value, ...about() } }))
      .catch((error) => self.postMessage({ error: words(error) }));
} else {
  page();
}

// The page.

async function page() {
  let request;
  try {
    request = await (await post("claim")).json();
  } catch (error) {
    return show(words(error)); // another browser's request is none of this page's business
  }
  const { alive, reply, error } = request.names;
  try {
    stay(alive);
    show("Running…");
    const found = { ...(await answered(request)), machine: await machine(), warmup: request.warmup };
    await goOn(await (await post(reply, JSON.stringify(found))).text());
  } catch (thrown) {
    show(words(thrown));
    await post(error, words(thrown));
  }
}

/** A response that never ends while this page lives: how Potstill knows that it does. */
async function stay(alive) {
  const reader = (await fetch(alive)).body.getReader();
  while (!(await reader.read()).done);
}

/** Wait for a further request, at an address that only this page was given. */
async function goOn(next) {
  show("Done. This page can be closed; while it is open, it takes further requests.");
  for (let tries = 0; tries < 600; tries++) {
    if (await fetch(next).then(({ ok }) => ok, () => false)) {
      return location.replace(next);
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

async function answered(request) {
  if (request.answer) {
    return inWorker("answer", request);
  }
  const specs = request.models.map((model) => ({ ...request, ...model }));
  if (specs.length > 1) {
    return inWorker("turns", { ...request, specs });
  }
  if (request.sustained) {
    return inWorker("sustained", specs[0]);
  }
  const found = await inWorker("measure", specs[0]);
  for (const threads of request.throughput ?? []) {
    const one = await inWorker("throughput", { ...specs[0], threads });
    found.models[0].throughput = { ...found.models[0].throughput, [one.threads]: one.rate };
  }
  return found;
}

/** What a task gives in a worker of its own, which ends with it. */
function inWorker(task, request) {
  const worker = new Worker(import.meta.url, { type: "module" });
  return new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => (data.error === undefined ? resolve(data.value) : reject(data.error));
    worker.onerror = (event) => reject(event.message ?? "the worker could not be started");
    worker.postMessage({ task, request });
  }).finally(() => worker.terminate());
}

async function machine() {
  const known = navigator.userAgentData; // secure contexts of Chromium only
  const brands = known?.brands.filter(({ brand }) => !/not.*brand/i.test(brand)) ?? []; // one is made up, on purpose
  const brand = brands.find(({ brand }) => brand !== "Chromium") ?? brands[0];
  return {
    system: known?.platform || navigator.platform,
    arch: "wasm32",
    cpu: brand ? `${brand.brand} ${brand.version}` : navigator.userAgent,
    cores: navigator.hardwareConcurrency,
  };
}

function show(text) {
  document.getElementById("status").textContent = text;
}

async function post(name, body) {
  const response = await fetch(name, { method: "POST", body });
  if (!response.ok) {
    throw new Error(`${name}: ${await response.text()}`);
  }
  return response;
}

/** An error in words; C++ throws numbers out of WebAssembly. */
function words(error) {
  if (typeof error === "number") {
    return `WebAssembly threw ${error}, often for want of memory`;
  }
  return String(error?.message ? `${error.name}: ${error.message}` : error);
}

// A worker: its runtime.

async function start({ runtime, threads }) {
  const seen = [];
  const Memory = WebAssembly.Memory;
  WebAssembly.Memory = function (limits) {
    seen.push(new Memory(limits));
    return seen.at(-1);
  };
  WebAssembly.Memory.prototype = Memory.prototype;
  console.log = (...parts) => printed(parts.join(" ")); // the runtime keeps the one that it finds
  const begin = performance.now();
  ort = await import(new URL(runtime.module, import.meta.url));
  ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  present = new Map(); // provider to why it is not here, null where it is
  for (const name of ["wasm", ...runtime.providers]) {
    present.set(name, await refusal(name, runtime.tiny));
  }
  if (present.get("webgpu") === null) {
    const { vendor, architecture, isFallbackAdapter } = (await navigator.gpu.requestAdapter()).info;
    gpu = { name: `${vendor} ${architecture}`, software: isFallbackAdapter };
  }
  baseline = { ms: performance.now() - begin, heap: () => seen.reduce((sum, one) => sum + one.buffer.byteLength, 0) / 1e6 };
  baseline.mb = baseline.heap();
}

/** Why a provider cannot open a model of one node; null where it can. */
async function refusal(name, tiny) {
  try {
    const session = await ort.InferenceSession.create(await bytes(tiny), { executionProviders: [name] });
    await session.release();
    return null;
  } catch (error) {
    if (name === "wasm") {
      throw error;
    }
    return words(error);
  }
}

/** What is true of the worker, whatever it did. */
function about() {
  return {
    threads: ort.env.wasm.numThreads,
    versions: { "onnxruntime-web": ort.env.versions.web, browser: navigator.userAgent },
    browser: { isolated: self.crossOriginIsolated, start_ms: baseline.ms, clock_ms: tick(), refused: refused(), gpu },
  };
}

function refused() {
  return Object.fromEntries([...present].filter(([name, why]) => why !== null && PROVIDERS[name] !== "wasm"));
}

/** The smallest step of the clock that was seen. */
function tick() {
  let least = Infinity;
  for (let i = 0; i < 20; i++) {
    const begin = performance.now();
    let now = begin;
    while (now === begin) {
      now = performance.now();
    }
    least = Math.min(least, now - begin);
  }
  return least;
}

/** The providers of a session, the CPU's last, which takes what the others do not, and the wanted ones that are not here. */
function used({ providers = ["wasm"] }) {
  const here = providers.filter((name) => present.get(name) === null);
  return {
    providers: [...here.filter((name) => name !== "wasm"), "wasm"],
    missing_providers: providers.filter((name) => !here.includes(name) && PROVIDERS[name] !== "wasm"),
  };
}

async function bytes(name) {
  const response = await fetch(name);
  if (!response.ok) {
    throw new Error(`${name}: ${response.status} ${response.statusText}`);
  }
  return new Uint8Array(await response.arrayBuffer());
}

/** A session with the options of the request, and the ms that it took once its files were here. */
async function open(spec, more = {}) {
  const model = await bytes(spec.path);
  const externalData = [];
  for (const { path, file } of spec.external[spec.path]) {
    externalData.push({ path, data: await bytes(file) });
  }
  const executionProviders = used(spec).providers.map((name) => ({ name, ...spec.provider_options?.[name] }));
  const begin = performance.now();
  const session = await ort.InferenceSession.create(model, {
    executionProviders, externalData, logSeverityLevel: 3, extra: { ...spec.session_options }, ...more,
  });
  return { session, ms: performance.now() - begin };
}

function tensor(dtype, raw, shape) {
  if (!ARRAYS[dtype]) {
    throw new Error(`onnxruntime-web takes no input of dtype ${dtype}`);
  }
  return new ort.Tensor(dtype, new ARRAYS[dtype](raw), shape);
}

async function feeds(spec) {
  const found = {};
  for (const [name, { file, dtype, shape }] of Object.entries(spec.inputs)) {
    found[name] = tensor(dtype, (await bytes(file)).buffer, shape);
  }
  return found;
}

// A worker: what it is asked.

async function measure(spec) {
  const inputs = await feeds(spec);
  const { session, ms } = await open(spec);
  const begin = performance.now();
  await session.run(inputs);
  const first = performance.now() - begin;
  const [times] = await inTurns([[session, inputs]], spec);
  const grown = baseline.heap() - baseline.mb;
  if (spec.operators) {
    await profile(spec, inputs);
  }
  const model = {
    ...used(spec), load_ms: ms, page_cache_dropped: false, first_run_ms: first, times_ms: times,
    baseline_mb: baseline.mb, peak_memory_mb: grown, // none: it fitted into what was free
    memory_method: grown ? "growth of WebAssembly's memory" : "unavailable",
  };
  return { models: [model] };
}

async function turns({ specs, ...request }) {
  const pairs = [];
  for (const spec of specs) {
    pairs.push([(await open(spec)).session, await feeds(spec)]);
  }
  const times = await inTurns(pairs, request);
  return { models: specs.map((spec, i) => ({ ...used(spec), times_ms: times[i] })) };
}

/** As `time_in_turns` of agent.py: warm-up rounds are not in the list, and each turn of several starts with 5 ms. */
async function inTurns(pairs, spec) {
  for (let round = 0; round < spec.warmup; round++) {
    for (const [session, inputs] of pairs) {
      await session.run(inputs);
    }
  }
  const times = pairs.map(() => []);
  const start = performance.now();
  while (!finished(times[0].length, (performance.now() - start) / 1e3, spec)) {
    for (const [i, [session, inputs]] of pairs.entries()) {
      if (pairs.length > 1) {
        await refillCaches(session, inputs);
      }
      const begin = performance.now();
      await session.run(inputs);
      times[i].push(performance.now() - begin);
    }
  }
  return times;
}

async function refillCaches(session, inputs) {
  const end = performance.now() + 5;
  do {
    await session.run(inputs);
  } while (performance.now() < end);
}

function finished(rounds, seconds, { runs, seconds: wanted, min_runs, max_runs }) {
  return runs === undefined ? rounds >= max_runs || (rounds >= min_runs && seconds >= wanted) : rounds >= runs;
}

async function sustained(spec) {
  const { session } = await open(spec);
  const inputs = await feeds(spec);
  const seconds = [];
  let said = Promise.resolve(); // in order, and without a pause of the load
  const start = performance.now();
  while (seconds.length < spec.sustained) {
    const times = [];
    while (!times.length || performance.now() < start + (seconds.length + 1) * 1e3) {
      const begin = performance.now();
      await session.run(inputs);
      times.push(performance.now() - begin);
    }
    const at = (performance.now() - start) / 1e3;
    const second = { at_s: at, runs: times.length, median_ms: percentile(times, 0.5), p90_ms: percentile(times, 0.9) };
    seconds.push(second);
    said = said.then(() => post(spec.names.said, JSON.stringify({ second })));
  }
  await said;
  return { models: [{ ...used(spec), seconds }] };
}

/** By linear interpolation. */
function percentile(values, share) {
  const sorted = Float64Array.from(values).sort();
  const place = share * (sorted.length - 1);
  const low = Math.floor(place);
  return sorted[low] + (sorted[Math.ceil(place)] - sorted[low]) * (place - low);
}

async function throughput(spec) {
  const { session } = await open(spec);
  const inputs = await feeds(spec);
  for (let i = 0; i < spec.warmup; i++) {
    await session.run(inputs);
  }
  const start = performance.now();
  let runs = 0;
  for (; performance.now() < start + 1e3; runs++) {
    await session.run(inputs);
  }
  return { rate: (runs * 1e3) / (performance.now() - start) };
}

/** A second session, profiled; onnxruntime-web prints its profile to the console when it ends. */
async function profile(spec, inputs) {
  const { session } = await open(spec, { enableProfiling: true });
  for (let i = 0; i <= PROFILED_RUNS; i++) {
    await session.run(inputs);
  }
  const lines = [];
  printed = (line) => lines.push(line);
  session.endProfiling();
  const events = JSON.parse(lines.join("\n"));
  for (const { args } of events) {
    if (args?.provider) {
      args.provider = PROVIDERS[args.provider] ?? args.provider;
    }
  }
  await post(spec.operators, JSON.stringify(events));
}

/** Each example run alone; their first outputs, raw, one after the other. */
async function answer(request) {
  const spec = { ...request, ...request.answer };
  const { session } = await open(spec);
  const given = (await bytes(spec.inputs)).buffer;
  const outputs = [];
  const parts = [];
  const end = performance.now() + (spec.seconds ?? Infinity) * 1e3;
  let offset = 0;
  for (const [i, example] of spec.examples.entries()) {
    const inputs = {};
    for (const [name, { dtype, shape }] of Object.entries(example)) {
      const size = shape.reduce((product, one) => product * one, ARRAYS[dtype]?.BYTES_PER_ELEMENT ?? 1);
      if (offset + size > given.byteLength) {
        throw new Error(`the inputs end within example ${i + 1}`);
      }
      inputs[name] = tensor(dtype, given.slice(offset, offset + size), shape);
      offset += size;
    }
    const lacking = session.inputNames.find((name) => !(name in inputs));
    if (lacking) {
      throw new Error(`example ${i + 1} lacks '${lacking}'`);
    }
    const wanted = Object.fromEntries(session.inputNames.map((name) => [name, inputs[name]]));
    const output = (await session.run(wanted))[session.outputNames[0]];
    if (!ARRAYS[output.type]) {
      throw new Error("the model's first output is no array of numbers");
    }
    parts.push(output.data);
    outputs.push({ dtype: output.type, shape: output.dims });
    if (performance.now() >= end) {
      break;
    }
  }
  if (outputs.length === spec.examples.length && offset < given.byteLength) {
    throw new Error(`the inputs hold more than their ${outputs.length} examples`);
  }
  await post(spec.outputs, new Blob(parts));
  return { answer: { ...used(spec), outputs } };
}
