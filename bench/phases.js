// What a profile of a server says about the path of a request. V8 has a stack for each callback of the event loop, and
// Fastify calls one hook inside the other. Here the stacks are sorted by phase, and hooks stand side by side.

const isNamed = (...names) => ({ name, whose }) => whose === 'node' && names.includes(name)
const LOOP = 'Event loop'
const isIn = (...files) => ({ file }) => files.some(start => file.startsWith(start))

/**
 * The phases of a request, in their order. A stack belongs to the first phase of which a frame fits `test`, in the order
 * of `rank`; else to that of which a frame fits `otherwise`.
 */
export const PHASES = [
  {
    title: 'Headers',
    text: 'Node parses the headers; the hooks find the caller and count the rate limit',
    rank: 1,
    test: isNamed('parserOnHeadersComplete', 'connectionListenerInternal', 'onconnection')
  },
  {
    title: 'Body to event',
    text: 'the body is read and parsed, the identity validated, the event made and put into a batch',
    rank: 4,
    test: isNamed('endReadableNT', 'parserOnBody', 'parserOnMessageComplete', 'resume_', 'onParserExecute', 'onStreamRead')
  },
  {
    title: 'To Mixpanel',
    text: 'the batch is encoded and written to Mixpanel by undici',
    rank: 3,
    test: ({ whose, file, name }) => whose === 'undici' || (file === 'src/concurrency/batcher.ts' && name === 'dispatch')
  },
  {
    title: 'Verdicts',
    text: 'Mixpanel’s answer is read and becomes a verdict for each identity',
    rank: 2,
    test: frame => frame.whose === 'undici' && frame.name === 'onHttpSocketReadable',
    // Verdicts travel on in microtasks, from which no stack leads back to undici.
    otherwise: ({ whose }) => whose === 'relay'
  },
  {
    title: 'Response',
    text: 'each caller gets its response; the access line is added to the log; metrics are counted',
    rank: 6,
    test: frame => isIn('fastify/lib/reply.js', 'fastify/lib/wrap-thenable.js', 'src/http/routes/', 'src/http/plugins/')(frame)
  },
  {
    title: 'Clean-up',
    text: 'Node frees the request and the response',
    rank: 5,
    test: isNamed('afterWriteTick', 'onFinish', 'emitCloseNT', 'onError', 'onWriteComplete', 'onDestroy')
  },
  { title: 'Log', text: 'the lines of the log are written together', rank: 7, test: isIn('src/log.ts') },
  { title: LOOP, text: 'native code of V8 and libuv: HTTP parser, polling, microtasks', rank: 8, test: () => false },
  { title: 'GC', text: 'garbage collection: V8 frees memory', rank: 0, test: ({ whose }) => whose === 'gc' }
]

const ranked = PHASES.toSorted((a, b) => a.rank - b.rank)
const phaseOf = frames => ranked.find(({ test }) => frames.some(test)) ??
  PHASES.find(({ otherwise }) => otherwise && frames.some(otherwise)) ?? PHASES.find(({ title }) => title === LOOP)

/** How Node enters JavaScript. A reader of the picture learns nothing from these frames. */
const ENTRIES = new Set([
  'processTicksAndRejections', 'runMicrotasks', 'processImmediate', 'processTimers', 'listOnTimeout', 'emit', 'callbackTrampoline'
])

/** Returns the stacks for the picture: the phase first, then the frames that a reader needs. */
export function phasesOf (stacks) {
  return stacks.map(({ frames, us }) => {
    const phase = phaseOf(frames)
    return { us, frames: [{ name: phase.title, file: '', whose: 'phase', depth: PHASES.indexOf(phase) }, ...readable(frames)] }
  })
}

/**
 * Returns the frames without those by which Node enters, and with every hook beside the one that called it. Each has
 * its `depth` in the stack: a hook that runs later is deeper, so depths give the order of siblings.
 */
function readable (frames) {
  const first = frames.findIndex(({ name, whose }) => !(ENTRIES.has(name) && ['node', 'native'].includes(whose)))
  const found = []
  let mark = 0
  for (const [depth, frame] of frames.entries()) {
    if (first !== -1 && depth < first) continue
    if (frame.file === 'fastify/lib/hooks.js') {
      if (/Runner$/.test(frame.name)) mark = found.length
      found.length = Math.min(found.length, mark)
      // Only if it is the innermost frame it stays.
      if (depth === frames.length - 1) found.push({ ...frame, name: 'run hooks', depth })
    } else {
      found.push({ ...frame, depth })
    }
  }
  return first === -1 ? [{ ...frames.at(-1), depth: 0 }] : found
}
