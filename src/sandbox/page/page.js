// Shows what the sandbox gets. Each text comes from outside, and is set as text alone.
/* global document, EventSource, fetch, requestAnimationFrame, location */
import { describe, draw } from './picture.js'

const MAX_ROWS = 500
/** A screen reader would otherwise never come to an end. */
const ANNOUNCE_MS = 4000
/** By then the stream has the effect of a button. */
const SOON_MS = 300
const RECONNECT_MS = 2000
const MODES = { original: 'Original ID Merge', simplified: 'Simplified ID Merge', legacy: 'Legacy ID management' }
const TIME = { hour: '2-digit', minute: '2-digit', second: '2-digit', hourCycle: 'h23' }

const byId = id => document.getElementById(id)

/** The state as the stream says it. The page shows it, unless it is paused. */
const state = { isNew: true, rows: [], clusters: new Map(), shown: [], total: 0 }
const figures = new Map() // id of a cluster → { cluster, figure, item }
let last
let isPaused = false
let isScheduled = false
let announced = ''

function connect () {
  const source = new EventSource('__sandbox/stream')
  source.onopen = () => showConnection('Live')
  source.onmessage = ({ data }) => receive(JSON.parse(data))
  source.onerror = () => {
    showConnection('Not connected; trying again')
    // After an answer that is no stream the browser does not try again itself.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, RECONNECT_MS)
  }
}

function showConnection (words) {
  byId('connection').textContent = words
  byId('connection').classList.toggle('live', words === 'Live')
}

function receive (update) {
  const { isWhole, rows, clusters } = update
  last = update
  if (isWhole) {
    state.isNew = true
    state.rows = []
    state.clusters.clear()
  }
  state.rows = [...rows.toReversed(), ...state.rows].slice(0, MAX_ROWS)
  for (const cluster of clusters.changed) state.clusters.set(cluster.id, cluster)
  state.shown = clusters.shown.toSorted((one, other) => other - one)
  state.total = clusters.total
  const shown = new Set(clusters.shown)
  for (const id of state.clusters.keys()) if (!shown.has(id)) state.clusters.delete(id)
  showFaults(update.faults)
  schedule()
}

function schedule () {
  if (isScheduled || isPaused || last === undefined) return
  isScheduled = true
  requestAnimationFrame(() => {
    isScheduled = false
    show()
  })
}

function show () {
  byId('mode').textContent = `The project has ${MODES[last.mode]}.`
  byId('hint').textContent = last.hint
  byId('hint').hidden = last.hint === ''
  for (const count of document.querySelectorAll('[data-count]')) {
    count.textContent = last.counts[count.dataset.count].toLocaleString('en')
  }
  showClusters()
  showRows()
  state.isNew = false
}

function showClusters () {
  for (const [id, { figure, item }] of figures) {
    if (state.clusters.has(id)) continue
    figure.remove()
    item.remove()
    figures.delete(id)
  }
  state.shown.forEach((id, index) => {
    const cluster = state.clusters.get(id)
    let entry = figures.get(id)
    if (entry === undefined) {
      entry = { figure: make('figure'), item: make('li') }
      figures.set(id, entry)
    }
    if (entry.cluster !== cluster) {
      entry.figure.replaceChildren(draw(cluster), make('figcaption', captionOf(cluster)))
      entry.figure.classList.toggle('grown', !state.isNew)
      entry.item.textContent = describe(cluster).join(' ')
      entry.cluster = cluster
    }
    insertAt(byId('clusters'), entry.figure, index)
    insertAt(byId('cluster-list'), entry.item, index)
  })
  const { total, shown } = state
  const noun = total === 1 ? 'cluster' : 'clusters'
  byId('clusters-more').textContent = total > shown.length
    ? `The ${shown.length} clusters that changed last, of ${total.toLocaleString('en')}.`
    : total === 0 ? 'No ids yet.' : `${total} ${noun}. A dashed line is a merge that Mixpanel refused.`
  byId('clusters-text').hidden = total === 0
}

function captionOf ({ user, pairs, more, refused }) {
  const count = pairs.length + more
  const parts = [`${user}: ${count.toLocaleString('en')} anonymous ${count === 1 ? 'id' : 'ids'}`]
  if (more > 0) parts.push(`the last ${pairs.length} shown`)
  if (refused.length > 0) parts.push(`${refused.length} refused`)
  return parts.join(', ')
}

function insertAt (parent, child, index) {
  if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null)
}

function showRows () {
  const body = byId('rows')
  if (state.isNew) body.replaceChildren()
  const wanted = new Set(state.rows.map(({ id }) => id))
  for (const row of [...body.children]) if (!wanted.has(row.id)) row.remove()
  state.rows.forEach((row, index) => {
    if (byId(row.id) === null) insertAt(body, rowOf(row), index)
  })
  const { events, refused } = last.counts
  const total = events + refused
  byId('events-more').textContent = total > state.rows.length
    ? `The page shows the last ${state.rows.length} of ${total.toLocaleString('en')}.`
    : total === 0 ? `No events yet. Start the relay with MIXPANEL_URL=${location.origin}, and the sandbox’s token.` : ''
}

function rowOf ({ id, time, arrived, endpoint, event, user, anon, outcome, detail, isDuplicate, filed }) {
  const row = make('tr')
  row.role = 'row'
  row.id = id
  row.className = outcome.startsWith('err') ? 'unmerged' : outcome
  row.classList.toggle('new', !state.isNew)
  const cells = [timeOf(time, arrived), event || `(${endpoint})`, user || '–', anon || '–', outcomeOf()]
  const names = ['Time', 'Event', 'distinct_id', 'Anonymous id', 'Outcome']
  cells.forEach((content, index) => {
    const cell = make('td')
    cell.role = 'cell'
    cell.dataset.name = names[index]
    cell.append(content)
    row.append(cell)
  })
  return row

  function outcomeOf () {
    const parts = make('div')
    parts.append(make('strong', outcome))
    if (isDuplicate) parts.append(' ', make('span', 'duplicate', 'badge'))
    parts.append(make('p', detail))
    if (filed !== '') {
      const details = make('details')
      details.append(make('summary', 'As filed'), make('pre', filed))
      parts.append(details)
    }
    return parts
  }
}

/** An event from the outbox arrives later than its time. */
function timeOf (time, arrived) {
  const parts = make('div')
  parts.append(clock(time ?? arrived))
  if (time !== null && Math.abs(arrived - time) > 2000) parts.append(make('p', `arrived ${clock(arrived)}`))
  return parts
}

const clock = ms => new Date(ms).toLocaleTimeString('en', TIME)

function showFaults (faults) {
  const list = faults.map(({ name, times }) => `${name} × ${times}`).join(', ')
  byId('script').textContent = list === '' ? 'No fault is waiting.' : `Waiting: ${list}.`
}

/** Says the counts, unless they are the same. A live region that changed with each event would never be silent. */
function announce () {
  if (last === undefined || isPaused) return
  const { events, duplicates, merged, unmerged, refused } = last.counts
  const words = `Events ${events}, duplicates ${duplicates}, merged ${merged}, merges refused ${unmerged}, ` +
    `faults and refused events ${refused}. ${byId('script').textContent}`
  if (words !== announced) byId('announcement').textContent = announced = words
}

async function send (method, path, body) {
  try {
    const answer = await fetch(path, { method, ...body !== undefined && { body: JSON.stringify(body) } })
    if (!answer.ok) throw new Error((await answer.json()).error)
    byId('failure').textContent = ''
    setTimeout(announce, SOON_MS)
  } catch (error) {
    byId('failure').textContent = `That did not work: ${error.message}.`
  }
}

function addFault (fault) {
  if (!byId('faults').reportValidity()) return
  send('POST', '__sandbox/faults', [{ ...fault, times: byId('times').valueAsNumber }])
}

/** Returns an element with a text. */
function make (name, content = '', className = '') {
  const element = document.createElement(name)
  element.textContent = content
  if (className !== '') element.className = className
  return element
}

for (const button of document.querySelectorAll('[data-fault]')) {
  button.addEventListener('click', () => addFault(JSON.parse(button.dataset.fault)))
}
byId('faults').addEventListener('submit', event => {
  event.preventDefault()
  addFault({ name: byId('other').value, ms: 1000 })
})
byId('clear-faults').addEventListener('click', () => send('DELETE', '__sandbox/faults'))
byId('clear').addEventListener('click', () => send('DELETE', '__sandbox'))
byId('pause').addEventListener('click', () => {
  isPaused = !isPaused
  byId('pause').textContent = isPaused ? 'Go on' : 'Pause'
  schedule()
})
setInterval(announce, ANNOUNCE_MS)
connect()
