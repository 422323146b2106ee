import { randomUUID } from 'node:crypto'
import type { Test } from 'tap'
import { identifyEvent } from '#src/identity/event.js'
import type { Entry, Outbox } from '#src/outbox/outbox.js'
import { identity } from './helper.ts'

export const event = (anon: string = randomUUID(), identified = `user-${randomUUID()}`, now = Date.now()) =>
  identifyEvent({ identified_id: identified, anon_id: anon, properties: { plan: 'a"b\n', 7: [1, { x: null }] } }, now)

/** The project of the outboxes in tests. */
/** A project as the configuration names it, whose other mode has stored nothing. */
export const project = (fingerprint: string, earlier: string[] = [], otherMode = 'other-mode') =>
  ({ fingerprint, earlier, otherMode: { fingerprint: otherMode, earlier: [] as string[] } })
export const PROJECT = project('a-project')

/** Tests what every outbox promises; `open` opens the same one again. */
export async function testPromises (t: Test, open: (maxEntries?: number) => Promise<Outbox>) {
  let outbox = await open()
  t.match(outbox.counts(), { waiting: 0, dead: 0 })
  t.same(await outbox.next(10), [])
  t.same(await outbox.waiting(10), [])
  t.same(await outbox.dead(10), [])

  const events = Array.from({ length: 2500 }, () => event())
  t.equal(await outbox.has(events[0]!.anonKey), 'no')
  for (let first = 0; first < events.length; first += 250) {
    const results = await Promise.all(events.slice(first, first + 250).map(one => outbox.put(one)))
    t.same(new Set(results), new Set(['stored']))
  }
  t.match(outbox.counts(), { waiting: 2500, dead: 0 })

  t.test('next returns the entries in order until they are acknowledged', async t => {
    const first = await outbox.next(400)
    t.same(first.map(entry => entry.event), events.slice(0, 400), 'the events are unchanged')
    t.equal(JSON.stringify(first.map(entry => entry.event)), JSON.stringify(events.slice(0, 400)))
    t.notOk(first.some(entry => 'endpoint' in entry))
    t.same(await outbox.next(400), first)
    t.same((await outbox.next(400, first[399]?.id)).map(entry => entry.event), events.slice(400, 800), 'next continues after an id')
    await outbox.ack(first.slice(0, 399))
    const next = await outbox.next(400)
    t.same(next[0], first[399], 'an entry that was not acknowledged is still the first')
    t.match(outbox.counts(), { waiting: 2101, dead: 0 })
    await outbox.ack(first.slice(0, 399))
    t.match(outbox.counts(), { waiting: 2101, dead: 0 }, 'a second acknowledgement changes nothing')
  })

  t.test('has answers yes as long as an entry of the anonymous id waits', async t => {
    const anon = randomUUID() as string
    const two = [event(anon.toUpperCase()), event(`$device:${anon}`)]
    for (const one of two) t.equal(await outbox.put(one), 'stored')
    t.equal(two[0]!.anonKey, two[1]!.anonKey)
    const other = event()
    t.equal(await outbox.put(other), 'stored')
    const found: Entry[] = []
    for (let entries = await outbox.next(2000); entries.length > 0; entries = await outbox.next(2000)) {
      found.push(...entries.filter(entry => two.some(one => one.json === entry.event.json)))
      await outbox.ack(entries.filter(entry => !found.includes(entry)))
      if (found.length === 2) break
    }
    t.equal(await outbox.put(other), 'stored')
    t.equal(await outbox.has(two[0]!.anonKey), 'yes')
    await outbox.ack(found.slice(0, 1))
    t.equal(await outbox.has(two[0]!.anonKey), 'yes')
    await outbox.deadLetter([{ entry: found[1]!, reason: 'because "so"\nit is' }])
    t.equal(await outbox.has(two[0]!.anonKey), 'no')
    t.equal(await outbox.has(events[2499]!.anonKey), 'no')
    t.match(outbox.counts(), { waiting: 1, dead: 1 })
    t.equal(await outbox.has(other.anonKey), 'yes')
    await outbox.ack(await outbox.next(10))
    t.match(outbox.counts(), { waiting: 0, dead: 1 })
  })

  t.test('dead letters have their reason, and can be replayed and dropped', async t => {
    for (let count = 0; count < 4; count++) t.equal(await outbox.put(event()), 'stored')
    const four = await outbox.next(10)
    await outbox.deadLetter(four.map((entry, index) => ({ entry, reason: `reason ${index}` })))
    await outbox.deadLetter(four.slice(0, 1).map(entry => ({ entry, reason: 'a second time' })))
    t.same(await outbox.next(10), [])
    t.match(outbox.counts(), { waiting: 0, dead: 5 })
    const letters = await outbox.dead(10)
    t.same(letters.map(letter => letter.reason), ['because "so"\nit is', 'reason 0', 'reason 1', 'reason 2', 'reason 3'])
    t.same(letters[1]?.event, four[0]?.event)
    t.ok(Math.abs(Date.now() - Number(letters[1]?.died)) < 60_000)
    t.same((await outbox.dead(2, letters[1]?.id)).map(letter => letter.id), [letters[2]?.id, letters[3]?.id])
    t.equal(await outbox.drop([letters[0]!, letters[2]!]), 2)
    t.equal(await outbox.drop([letters[0]!]), 0)
    t.equal(await outbox.replay([{ id: letters[4]!.id, endpoint: 'import' }, { id: letters[3]!.id }, { id: letters[2]!.id }]), 2)
    t.match(outbox.counts(), { waiting: 2, dead: 1 })
    t.equal(await outbox.has(four[3]!.event.anonKey!), 'yes')
    const again = await outbox.next(10)
    t.match(again, [{ event: four[3]?.event, endpoint: 'import' }, { event: four[2]?.event }])
    t.notOk('endpoint' in again[1]!)
    await outbox.ack(again)
  })

  t.test('next returns at most a megabyte of large entries', async t => {
    const large = Array.from({ length: 60 }, () => identifyEvent({ ...identity(), properties: { text: 'x'.repeat(50_000) } }, Date.now()))
    for (const one of large) t.equal(await outbox.put(one), 'stored')
    const counts: number[] = []
    for (let entries = await outbox.next(400); entries.length > 0; entries = await outbox.next(400)) {
      counts.push(entries.length)
      await outbox.ack(entries)
    }
    t.same(counts, [20, 20, 20])
  })

  t.test('the bytes of entries and dead letters are counted and bounded', async t => {
    for (let entries = await outbox.next(100); entries.length > 0; entries = await outbox.next(100)) await outbox.ack(entries)
    await outbox.drop(await outbox.dead(100))
    t.same(outbox.counts(), { waiting: 0, dead: 0, bytes: 0, paused: false })
    const ten = Array.from({ length: 10 }, () => event())
    const bytes = ten.slice(0, 6).reduce((sum, one) => sum + one.bytes, 0)
    const results = await Promise.all(ten.map(one => outbox.put(one, bytes)))
    t.equal(results.filter(result => result === 'stored').length, 6, 'what fits is stored, and the rest is rejected')
    t.equal(outbox.counts().bytes, bytes)
    t.equal(await outbox.put(event(), bytes), 'rejected')
    const waiting = await outbox.next(10)
    await outbox.deadLetter(waiting.slice(0, 2).map(entry => ({ entry, reason: 'why' })))
    t.equal(outbox.counts().bytes, bytes, 'a dead letter takes as much')
    t.equal(await outbox.erase(waiting), 4)
    t.equal(await outbox.erase(waiting), 0)
    t.equal(outbox.counts().bytes, waiting[0]!.event.bytes + waiting[1]!.event.bytes)
    t.equal(await outbox.replay([(await outbox.dead(1))[0]!]), 1)
    t.equal(await outbox.expire(new Date(Date.now() - 60_000)), 0)
    t.equal(await outbox.expire(new Date(Date.now() + 60_000)), 1)
    t.match(outbox.counts(), { waiting: 1, dead: 0 })
    await outbox.ack(await outbox.next(1))
    t.same(outbox.counts(), { waiting: 0, dead: 0, bytes: 0, paused: false })
  })

  t.test('a paused outbox stores, and next returns nothing until it is resumed', async t => {
    await outbox.pause(true)
    t.equal(await outbox.put(event()), 'stored')
    t.same(await outbox.next(10), [])
    t.equal(outbox.counts().paused, true)
    t.equal((await outbox.waiting(10)).length, 1)
    await outbox.close()
    const next = outbox = await open()
    t.equal(next.counts().paused, true, 'the pause survives a restart')
    await next.pause(false)
    const entries = await next.next(10)
    t.equal(entries.length, 1)
    await next.deadLetter([{ entry: entries[0]!, reason: 'the last' }])
  })

  t.test('the entries survive a close, and their number is bounded', async t => {
    const one = event()
    t.equal(await outbox.put(one), 'stored')
    await outbox.close()
    const next = await open(3)
    t.match(next.counts(), { waiting: 1, dead: 1 })
    t.equal(await next.put(event()), 'stored')
    t.equal(await next.put(event()), 'rejected', 'dead letters count against the bound')
    const [first] = await next.waiting(10)
    t.same(first?.event, one)
    t.equal((await next.waiting(10, first?.id)).length, 1)
    await next.ack(await next.next(10))
    t.same(await Promise.all([next.put(event()), next.put(event())]), ['stored', 'stored'])
    t.same(await Promise.all([next.put(event()), next.put(event())]), ['rejected', 'rejected'])
    t.match(next.counts(), { waiting: 2, dead: 1 })
    await next.close()
  })
}
