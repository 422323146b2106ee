// Draws a cluster of identities: users on the left, anonymous ids on the right, refused merges as dashed lines.
/* global document */

const WIDTH = 344
const NODE = { left: 4, right: 204, width: 136, height: 26, gap: 10 }
const USER_END = NODE.left + NODE.width
const NAMESPACE = 'http://www.w3.org/2000/svg'

const REASONS = {
  errAnonDistinctIdAssignedAlready: 'the anonymous id has another user',
  errManyIDs: 'the cluster has as many ids as Mixpanel permits',
  errSameIDs: 'the ids are equal',
  errAnonDistinctIdNonGUIDForm: 'the anonymous id has no known form'
}

/** Returns sentences with all that the picture of a cluster shows. */
export function describe ({ user, pairs, more, refused }) {
  const users = new Map()
  for (const pair of pairs) users.set(pair.user, [...users.get(pair.user) ?? [], pair.anon])
  const sentences = [...users].map(([name, anons]) => `${name} has ${anons.join(', ')}.`)
  if (pairs.length === 0) sentences.push(`${user} has no anonymous id.`)
  if (more > 0) sentences.push(`${more.toLocaleString('en')} more before ${more === 1 ? 'it' : 'them'}.`)
  for (const { anon, user, reason, times } of refused) {
    const often = times > 1 ? `, ${times} times` : ''
    sentences.push(`Refused: ${user} with ${anon}, because ${REASONS[reason]} (${reason}${often}).`)
  }
  return sentences
}

/** Returns an SVG element with its title and description. Texts never become markup. */
export function draw (cluster) {
  const { id, user, pairs, refused } = cluster
  const users = new Map()
  const anons = new Map()
  if (pairs.length === 0) place(users, user, false)
  for (const pair of pairs) {
    place(users, pair.user, false)
    place(anons, pair.anon, false)
  }
  for (const pair of refused) {
    place(users, pair.user, true)
    place(anons, pair.anon, true)
  }
  const height = Math.max(users.size, anons.size) * (NODE.height + NODE.gap) + NODE.gap
  const svg = element('svg', { viewBox: `0 0 ${WIDTH} ${height}`, role: 'img', 'aria-labelledby': `t${id} d${id}` })
  svg.append(text('title', { id: `t${id}` }, `Cluster of ${user}`))
  svg.append(text('desc', { id: `d${id}` }, describe(cluster).join(' ')))
  const top = (column, name) => place.top(column.get(name).index, column.size, height)
  for (const { anon, user, reason } of [...pairs, ...refused]) {
    const [from, to] = [top(users, user), top(anons, anon)].map(y => y + NODE.height / 2)
    const bend = (USER_END + NODE.right) / 2
    const d = `M${USER_END} ${from}C${bend} ${from} ${bend} ${to} ${NODE.right} ${to}`
    svg.append(element('path', { d, class: reason === undefined ? 'merge' : 'merge refused' }))
    // A cross too, because colour and dashes are easily missed. It is a fifth of the way, where few lines meet.
    if (reason !== undefined) svg.append(crossAt(USER_END + 0.3 * (bend - USER_END), from + 0.1 * (to - from)))
  }
  for (const [name, node] of users) svg.append(nodeOf(name, node, 'user', NODE.left, top(users, name)))
  for (const [name, node] of anons) svg.append(nodeOf(name, node, 'anon', NODE.right, top(anons, name)))
  return svg
}

/** An id that only a refused merge has is not in the cluster. */
function place (column, name, isOutside) {
  if (!column.has(name)) column.set(name, { index: column.size, isOutside })
}

/** The shorter column stands in the middle. */
place.top = (index, count, height) => {
  const used = count * (NODE.height + NODE.gap) - NODE.gap
  return (height - used) / 2 + index * (NODE.height + NODE.gap)
}

function nodeOf (name, { isOutside }, kind, x, y) {
  const group = element('g', { class: isOutside ? `node ${kind} outside` : `node ${kind}` })
  const radius = kind === 'user' ? 5 : NODE.height / 2
  group.append(
    text('title', {}, name),
    element('rect', { x, y, width: NODE.width, height: NODE.height, rx: radius }),
    text('text', { x: x + NODE.width / 2, y: y + NODE.height / 2 + 4 }, shorten(name))
  )
  return group
}

function crossAt (x, y) {
  return element('path', { d: `M${x - 4} ${y - 4}l8 8m0 -8l-8 8`, class: 'cross' })
}

/** The ends of an id tell it from others. */
function shorten (name) {
  const letters = [...name]
  return letters.length <= 17 ? name : `${letters.slice(0, 10).join('')}…${letters.slice(-5).join('')}`
}

function element (name, attributes) {
  const made = document.createElementNS(NAMESPACE, name)
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value))
  return made
}

function text (name, attributes, content) {
  const made = element(name, attributes)
  made.textContent = content
  return made
}
