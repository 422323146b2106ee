import { closeSync, openSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Writable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { createDestination, fileSink, streamSink, throttledError, type Sink } from '../src/log.ts'
import { temporary } from './helper.ts'

/** A sink that a test stalls and breaks. */
function createSink () {
  const state = { isStalled: false, isBroken: false, text: '' }
  const waiting: [string, (error?: Error | null) => void][] = []
  const write: Sink['write'] = (text, done) => {
    if (state.isStalled) return waiting.push([text, done])
    if (!state.isBroken) state.text += text
    done(state.isBroken ? new Error('ENOSPC') : null)
  }
  const sink: Sink = {
    waiting: () => waiting.reduce((sum, [text]) => sum + text.length, 0), write, writeNow: text => { state.text += text }
  }
  const release = () => {
    state.isStalled = false
    for (const [text, done] of waiting.splice(0)) write(text, done)
  }
  return { state, sink, release }
}

const line = (index: number) => `{"index":${index},"text":"${'x'.repeat(1000)}"}\n`
const lines = (text: string) => text.split('\n').slice(0, -1).map(one => JSON.parse(one))

t.test('lines are gathered, and none is missing at the end', async t => {
  const { sink, state } = createSink()
  const { write, flush } = createDestination(sink)
  write(line(0))
  t.equal(state.text, '')
  await sleep(150)
  t.equal(lines(state.text).length, 1)
  for (let index = 1; index <= 100; index++) write(line(index))
  flush()
  flush()
  t.same(lines(state.text).map(({ index }) => index), Array.from({ length: 101 }, (_, index) => index))
})

t.test('a reader that stalls: lines beyond a megabyte are dropped, counted, and their count is logged', async t => {
  const { sink, state, release } = createSink()
  const { write, flush } = createDestination(sink)
  state.isStalled = true
  for (let index = 0; index < 10_000; index++) write(line(index))
  t.ok(sink.waiting() <= 1_048_576)
  t.ok(sink.waiting() > 1_000_000 - 33_000)
  release()
  const kept = lines(state.text)
  const { dropped } = kept.find(one => 'dropped' in one)
  write(line(10_000))
  flush()
  t.match(kept.find(one => 'dropped' in one), { level: 40, time: Number, msg: 'log lines dropped' })
  t.equal(lines(state.text).filter(one => 'index' in one).length + dropped, 10_001, 'what is not there is counted')
})

t.test('a sink that fails: what it lost is counted, and it is tried again', async t => {
  const { sink, state } = createSink()
  const { write, flush } = createDestination(sink)
  state.isBroken = true
  for (let index = 0; index < 100; index++) write(line(index))
  await sleep(150)
  flush()
  t.equal(state.text, '')
  state.isBroken = false
  write(line(100))
  await sleep(150)
  t.match(lines(state.text), [{ index: 100 }, { dropped: 100, msg: 'log lines dropped' }])
})

t.test('the count of what is lost is lost neither', async t => {
  const texts: string[] = []
  const results = [new Error('ENOSPC'), null, new Error('ENOSPC'), null, null]
  const { write } = createDestination({ waiting: () => 0, writeNow () {}, write (text, done) { texts.push(text); done(results.shift()) } })
  for (let index = 0; index < 3; index++) {
    write(line(index))
    await sleep(120)
  }
  t.match(texts.map(text => JSON.parse(text)), [{ index: 0 }, { index: 1 }, { dropped: 1 }, { index: 2 }, { dropped: 1 }])
})

t.test('a file: in order, in spite of errors', async t => {
  const path = join(temporary(t), 'log')
  writeFileSync(path, '')
  const fd = openSync(path, 'a')
  const sink = fileSink(fd)
  const written = Promise.all(['a', 'b', 'c'.repeat(200_000)].map(text => new Promise(resolve => sink.write(text, resolve))))
  t.equal(sink.waiting(), 200_002)
  t.same(await written, [null, null, null])
  t.equal(sink.waiting(), 0)
  sink.writeNow('d')
  t.equal(readFileSync(path, 'utf8'), `ab${'c'.repeat(200_000)}d`)
  closeSync(fd)
  t.match(await new Promise(resolve => sink.write('e', resolve)), { code: 'EBADF' })
  t.doesNotThrow(() => sink.writeNow('f'))
  const full = openSync('/dev/full', 'w')
  t.match(await new Promise(resolve => fileSink(full).write('g', resolve)), { code: 'ENOSPC' })
  closeSync(full)
})

t.test('a stream whose reader is gone ends nothing', async t => {
  const stream = new Writable({ write: (chunk, encoding, done) => done(new Error('EPIPE')) })
  const sink = streamSink(stream)
  t.match(await new Promise(resolve => sink.write('a', resolve)), { message: 'EPIPE' })
  sink.writeNow('b')
  t.equal(sink.waiting(), 0)
})

t.test('what happens to many is said once in a while', async (t: Test) => {
  const said: string[] = []
  const say = throttledError((what, message) => { said.push(message) }, 50)
  for (const message of ['a', 'b']) say({}, message)
  await sleep(60)
  say({}, 'c')
  t.same(said, ['a', 'c'])
})
