import { basename } from 'node:path'

const WIDTH = 1200
const EDGE = 12
const ROW = 19
const TOP = 62
/** Boxes below this share are left out. */
const LEAST_SHARE = 0.002
/** A function with this share of its time in one other only passes on. */
const PASSES_ON = 0.92
/** The width of a letter, on average. */
const LETTER = 5.4

const WHOSE = {
  relay: 'this relay', fastify: 'Fastify, its router, Ajv', undici: 'undici', node: 'Node’s JavaScript', native: 'native code', gc: 'garbage collection'
}

/**
 * Returns an SVG of the tree of a profile (profile.js), whose first level are the phases of a request (phases.js): a box
 * for each function, above those that it calls. `each` is the CPU µs of one identity.
 */
export function flamePicture (tree, { title, each, phases }) {
  const shown = tree.children.map(child => shorten(child, LEAST_SHARE * tree.total))
  const scale = (WIDTH - 2 * EDGE) / tree.total
  const microseconds = us => (us / tree.total * each).toFixed(1)
  const percent = us => `${(us / tree.total * 100).toFixed(1)} %`
  const boxes = []
  let depth = 0

  function draw (node, x, row) {
    const width = node.total * scale
    depth = Math.max(depth, row)
    boxes.push(box(node, x, TOP + row * ROW, width))
    let at = x
    for (const child of node.children) {
      if (child.total / tree.total >= LEAST_SHARE) draw(child, at, row + (row === 0 ? 2 : 1))
      at += child.total * scale
    }
  }

  function box (node, x, y, width) {
    const { frame, total, us, via } = node
    const isPhase = frame.whose === 'phase'
    const hint = isPhase
      ? `${frame.name}: ${microseconds(total)} µs, ${percent(total)}`
      : `${labelOf(frame)}, ${frame.file} (${WHOSE[frame.whose]})\n${microseconds(total)} µs, ${percent(total)}; itself ${percent(us)}` +
        (via.length > 0 ? `\nthrough ${via.join(', ')}` : '')
    const rect = `<rect x="${x.toFixed(1)}" y="${y}" width="${Math.max(width - 0.6, 0.6).toFixed(1)}" height="${(isPhase ? 2 * ROW : ROW) - 1}" rx="2"/>`
    const texts = isPhase ? headOf(node, x, y, width) : textIn(labelOf(frame), x, y + 13, width)
    return `<g class="${frame.whose}"><title>${escape(hint)}</title>${rect}${texts}</g>`
  }

  /** The head of a phase that is too narrow for its name has its number, for the list below. */
  function headOf ({ frame, total }, x, y, width) {
    const number = phases.findIndex(one => one.title === frame.name) + 1
    const head = `${number} ${frame.name}`
    return textIn(head.length * LETTER < width ? head : `${number}`, x, y + 15, Math.max(width, 11)) +
      (width > 40 ? textIn(`${microseconds(total)} µs`, x, y + 30, width) : '')
  }

  shown.reduce((x, phase) => {
    draw(phase, x, 0)
    return x + phase.total * scale
  }, EDGE)

  const keyTop = TOP + (depth + 1) * ROW + 26
  const key = phases.map(({ title, text }, index) => {
    const us = shown.find(({ frame }) => frame.name === title)?.total ?? 0
    const y = keyTop + index * 18
    return `<text x="${EDGE + 16}" y="${y}" text-anchor="end">${index + 1}</text>` +
      `<text x="${EDGE + 26}" y="${y}" class="name">${title}</text>` +
      `<text x="${EDGE + 210}" y="${y}" text-anchor="end">${microseconds(us)} µs</text>` +
      `<text x="${EDGE + 270}" y="${y}" text-anchor="end">${percent(us)}</text>` +
      `<text x="${EDGE + 290}" y="${y}">${text}</text>`
  })
  const own = ownTimes(tree)
  const legend = Object.entries(WHOSE).map(([whose, name], index) => {
    const x = EDGE + index * (WIDTH - 2 * EDGE) / Object.keys(WHOSE).length
    return `<g class="${whose}"><rect x="${x.toFixed(0)}" y="38" width="14" height="14" rx="2"/></g>` +
      `<text x="${(x + 20).toFixed(0)}" y="49">${name} ${microseconds(own.get(whose) ?? 0)} µs</text>`
  })
  const height = keyTop + phases.length * 18
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" width="${WIDTH}" height="${height}" font-family="sans-serif" font-size="12">
<style>${STYLE}</style>
<text x="${EDGE}" y="22" font-size="15" class="name">${escape(title)}</text>
${legend.join('\n')}
<text x="${WIDTH - EDGE}" y="22" text-anchor="end">A box calls the boxes below it. Its width is its CPU time.</text>
${boxes.join('\n')}
${key.join('\n')}
</svg>
`
}

const STYLE = `
text { fill: #333 } .name, .phase text { font-weight: bold } g text { font-size: 10.5px }
.phase rect { fill: #e4e7eb } .relay rect { fill: #5b3df5 } .relay text { fill: #fff } .fastify rect { fill: #9fdcc4 }
.undici rect { fill: #ffcc80 } .node rect { fill: #b9d4f1 } .native rect { fill: #cfc8c0 } .gc rect { fill: #f0a8a8 }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .phase rect { fill: #343a42 } .relay rect { fill: #6f55f7 } .fastify rect { fill: #1f6b50 }
  .undici rect { fill: #87560c } .node rect { fill: #2c5680 } .native rect { fill: #5b554e } .gc rect { fill: #8c3b3b }
}`

/** Returns the time in the functions themselves, by whose they are. */
function ownTimes ({ frame, us, children }, sums = new Map()) {
  sums.set(frame.whose, (sums.get(frame.whose) ?? 0) + us)
  for (const child of children) ownTimes(child, sums)
  return sums
}

/**
 * Returns a node without the functions that only pass on: those of others, and those of the relay that call another of
 * the relay. `via` has their names. None is left out that also calls a function of the relay for `least` µs or more.
 */
function shorten (node, least) {
  const via = []
  let { frame, us, children } = node
  for (;;) {
    const [most, ...others] = children.toSorted((a, b) => b.total - a.total)
    const isPassing = most !== undefined && most.total >= PASSES_ON * node.total && frame.whose !== 'phase' &&
      (frame.whose !== 'relay' || most.frame.whose === 'relay') &&
      others.every(({ frame, total }) => frame.whose !== 'relay' || total < least)
    if (!isPassing) break
    via.push(labelOf(frame));
    ({ frame, us, children } = most)
  }
  return { frame, us, via, total: node.total, children: children.map(child => shorten(child, least)) }
}

/** Names that say little without knowledge of Node and V8. */
const PLAIN = {
  writev: 'write (system call)',
  writeUtf8String: 'write (system call)',
  oneShotDigest: 'digest',
  '(program)': 'V8, libuv, kernel',
  runMicrotasks: 'microtasks'
}

/** A function without a name is called after its file. */
function labelOf ({ name, file, whose }) {
  if (whose === 'native' && PLAIN[name]) return PLAIN[name]
  return name === '' ? basename(file) : name.replace(/^\((.*)\)$/, '$1')
}

/** The text, or as much of it as there is room for. */
function textIn (text, x, y, width) {
  const room = Math.floor((width - 5) / LETTER)
  if (text.length <= room) return textAt(text, x, y)
  return room < 4 ? '' : textAt(`${text.slice(0, room - 1)}…`, x, y)
}

const textAt = (text, x, y) => `<text x="${(x + 3).toFixed(1)}" y="${y}">${escape(text)}</text>`

const escape = text => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;')
