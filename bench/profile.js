// From a CPU profile of V8 to stacks with their time, and from stacks to a tree or to sums.

/** A longer gap between two samples is no work of this process: another process had the core. */
const LONGEST_GAP_US = 2000

/**
 * Returns [{ frames, us }], one for each stack that was seen, the outermost frame first, without idle time. A frame has
 * `name`, `file` and `whose`: relay, undici, fastify (all other packages), node (its JavaScript), native or gc.
 */
export function stacksOf ({ nodes, samples, timeDeltas }) {
  const frames = new Map()
  const children = new Map(nodes.map(({ id, children = [] }) => [id, children]))
  const byId = new Map(nodes.map(node => [node.id, node]))
  const visit = (id, above) => {
    const own = [...above, frameOf(byId.get(id).callFrame)]
    frames.set(id, own)
    for (const child of children.get(id)) visit(child, own)
  }
  for (const child of children.get(nodes[0].id)) visit(child, [])

  const times = new Map()
  samples.forEach((id, index) => {
    // A sample holds until the next one.
    const us = Math.min(timeDeltas[index + 1] ?? 0, LONGEST_GAP_US)
    times.set(id, (times.get(id) ?? 0) + us)
  })
  return [...times]
    .filter(([id]) => !['(root)', '(idle)'].includes(byId.get(id).callFrame.functionName))
    .map(([id, us]) => ({ frames: frames.get(id), us }))
}

/** Scripts of the relay and of packages have a URL. Compiled schemas have none, but a line. Native code has neither. */
function frameOf ({ functionName: name, url, lineNumber }) {
  const [, path] = /.*\/node_modules\/(.*)$/.exec(url) ?? []
  if (path !== undefined) return { name, file: path, whose: path.startsWith('undici/') ? 'undici' : 'fastify' }
  const [, ours] = /\/dist\/(.*)\.js$/.exec(url) ?? []
  if (ours !== undefined) return { name, file: `src/${ours}.ts`, whose: 'relay' }
  if (url.startsWith('wasm:') || name.startsWith('wasm-')) return { name: 'llhttp in WebAssembly', file: 'undici', whose: 'undici' }
  if (url.startsWith('node:')) return { name, file: url, whose: 'node' }
  if (url.includes('/bench/')) return { name, file: url.replace(/.*\/bench\//, 'bench/'), whose: 'fastify' }
  if (lineNumber >= 0) return { name, file: 'compiled by Ajv or find-my-way', whose: 'fastify' }
  return { name, file: 'native', whose: name === '(garbage collector)' ? 'gc' : 'native' }
}

/**
 * Returns a tree of [{ frames, us }]: { frame, us, total, order, children }. `us` is time in the frame itself, `total`
 * with what it calls. Children are in the order of `order`, the mean of the frame's `depth`, the relay's first.
 */
export function treeOf (stacks) {
  const create = frame => ({ frame, us: 0, total: 0, order: 0, byKey: new Map() })
  const root = create({ name: 'all', file: '', whose: 'all' })
  for (const { frames, us } of stacks) {
    let node = root
    node.total += us
    for (const frame of frames) {
      const key = `${frame.name} ${frame.file}`
      if (!node.byKey.has(key)) node.byKey.set(key, create(frame))
      node = node.byKey.get(key)
      node.total += us
      node.order += us * (frame.depth ?? 0)
    }
    node.us += us
  }
  const isRelay = ({ frame }) => Number(frame.whose === 'relay')
  const finish = ({ frame, us, total, order, byKey }) => ({
    frame,
    us,
    total,
    order: Math.round(order / total),
    children: [...byKey.values()].map(finish)
      .sort((a, b) => a.order - b.order || isRelay(b) - isRelay(a) || b.total - a.total)
  })
  return finish(root)
}

/** The parts of the program that the table names; the first that fits is the part of a stack. */
const PARTS = [
  ['garbage collection', ({ whose }) => whose === 'gc'],
  ['write to Mixpanel', ({ name, whose }, frames) => isWrite(name, whose) && frames.some(frame => frame.whose === 'undici')],
  ['write the log', ({ whose }, frames) => whose !== 'relay' && frames.some(({ file }) => file === 'src/log.ts')],
  ['write the responses', ({ name, whose }) => isWrite(name, whose)],
  ['hashes', ({ file, name }) => file.startsWith('node:internal/crypto/') || (file === 'native' && /digest|hash/i.test(name))],
  ...['http', 'identity', 'relay', 'concurrency', 'mixpanel', 'outbox'].map(folder => [
    `\`src/${folder}/\``, ({ file }) => file.startsWith(`src/${folder}/`)
  ]),
  ['`src/*.ts`: log, metrics', ({ whose }) => whose === 'relay'],
  ['Fastify, its router, Ajv', ({ whose }) => whose === 'fastify'],
  ['undici', ({ whose }) => whose === 'undici'],
  ['Node’s JavaScript: HTTP, streams', ({ whose }) => whose === 'node'],
  ['other native code: HTTP parser, event loop, V8', () => true]
]

const isWrite = (name, whose) => whose === 'native' && /^(?:writev|write[A-Z]\w*String|writeBuffer)$/.test(name)

/** The order of the table: the relay's own code, what it uses, and what every server does. */
const ROWS = [
  '`src/http/`', '`src/identity/`', '`src/relay/`', '`src/concurrency/`', '`src/mixpanel/`', '`src/outbox/`',
  '`src/*.ts`: log, metrics', 'hashes', 'undici', 'write to Mixpanel', 'write the log', 'Fastify, its router, Ajv',
  'Node’s JavaScript: HTTP, streams', 'write the responses', 'other native code: HTTP parser, event loop, V8',
  'garbage collection'
]

/** Returns [[part, its share of all time]] in the order of the table. */
export function sharesOf (stacks) {
  const sums = new Map(ROWS.map(name => [name, 0]))
  let all = 0
  for (const { frames, us } of stacks) {
    const [part] = PARTS.find(([, fits]) => fits(frames.at(-1), frames))
    sums.set(part, sums.get(part) + us)
    all += us
  }
  return [...sums].map(([part, us]) => [part, us / all])
}
