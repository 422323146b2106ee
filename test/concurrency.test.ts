import { setImmediate as nextTurn, setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { createBatcher } from '#src/concurrency/batcher.js'
import { createKeyedMutex } from '#src/concurrency/keyed-mutex.js'
import { createSemaphore } from '#src/concurrency/semaphore.js'
import { createSlices } from '#src/concurrency/slices.js'

t.test('the batcher keeps order and bounds, answers late items, and passes on an exception', async t => {
  // The batcher's timer does not keep a process alive; in the relay its server does.
  const alive = setInterval(() => {}, 1000)
  t.teardown(() => clearInterval(alive))
  const sent: number[][] = []
  const batcher = createBatcher<number, string>({
    send: async items => {
      sent.push(items)
      await sleep(100)
      if (items.includes(13)) throw new Error('a bug')
      return items.map(item => `result ${item}`)
    },
    maxBatch: 3,
    freeSends: 1,
    maxSends: 1,
    late: { afterMs: 150, result: 'late' },
    isAlone: item => item >= 100
  })
  await batcher.idle()
  const results = [1, 2, 100, 3, 4, 5, 6, 7].map(item => batcher.add(item))
  t.same(await Promise.all(results), ['result 1', 'result 2', 'result 100', 'late', 'late', 'late', 'late', 'late'])
  t.same(sent, [[1, 2], [100]])
  const bug = [batcher.add(13), batcher.add(14)]
  const idle = batcher.idle()
  await sleep(10)
  const later = batcher.add(15)
  for (const result of bug) await t.rejects(result, { message: 'a bug' })
  await idle
  t.equal(await later, 'result 15')
})

t.test('the batcher answers the callers of a slow send a few in each turn, and those of a quick one together', async t => {
  const perTurn = async (ms: number) => {
    const batcher = createBatcher<number, number>({
      send: async items => {
        await sleep(ms)
        return items
      },
      maxBatch: 50
    })
    const answered: number[] = []
    for (let index = 0; index < 12; index++) batcher.add(index).then(result => answered.push(result))
    const counts: number[] = []
    while (answered.length < 12) {
      const before = answered.length
      await nextTurn()
      if (answered.length > before) counts.push(answered.length - before)
    }
    return counts
  }
  t.same(await perTurn(50), [5, 5, 2])
  t.same(await perTurn(0), [12])
})

t.test('the batcher bounds the bytes of an array', async t => {
  const sent: number[][] = []
  const batcher = createBatcher<number, number>({
    send: async items => {
      sent.push(items)
      await sleep(20)
      return items
    },
    maxBatch: 100,
    bytesOf: item => item,
    maxBytes: 10,
    freeSends: 1,
    late: { afterMs: 1000, result: -1 }
  })
  const items = [4, 4, 4, 10, 30, 1, 9, 1]
  t.same(await Promise.all(items.map(item => batcher.add(item))), items)
  t.same(sent, [[4, 4], [4], [10], [30], [1, 9], [1]])
  await batcher.add(5)
  t.same(sent.at(-1), [5], 'all bytes are released after the send')
})

t.test('the semaphore runs so many tasks at a time, in order, and a failure ends only its own', async t => {
  const { run, running } = createSemaphore(2)
  const begun: number[] = []
  let most = 0
  const tasks = Array.from({ length: 6 }, (_, index) => run(async () => {
    begun.push(index)
    most = Math.max(most, running())
    await sleep(5)
    if (index === 1) throw new Error('a bug')
    return index
  }))
  t.same((await Promise.allSettled(tasks)).map(result => result.status === 'fulfilled' ? result.value : result.reason.message), [0, 'a bug', 2, 3, 4, 5])
  t.same([begun, most, running()], [[0, 1, 2, 3, 4, 5], 2, 0])
})

/** Runs a task in its turn. */
async function run<Result> (mutex: ReturnType<typeof createKeyedMutex>, key: string, task: () => Promise<Result>, owner?: string): Promise<Result> {
  await mutex.enter(key, owner)
  try {
    return await task()
  } finally {
    mutex.leave(key)
  }
}

t.test('the keyed mutex runs one task of a key at a time, and an exception reaches only its own caller', async t => {
  const mutex = createKeyedMutex(4)
  await mutex.idle()
  const log: string[] = []
  const work = (name: string, result: string, ms = 20) => async () => {
    log.push(`${name} begins`)
    await sleep(ms)
    log.push(`${name} ends`)
    if (result === 'bug') throw new Error('a bug')
    return result
  }
  const bug = run(mutex, 'x', work('a', 'bug'))
  const rest = [run(mutex, 'x', work('b', 'no')), run(mutex, 'x', work('c', 'taken')), run(mutex, 'x', work('d', 'no')), run(mutex, 'x', work('e', 'no'))]
  const other = run(mutex, 'y', work('z', 'no', 1))
  t.equal(mutex.enter('x'), 'full')
  t.equal(mutex.inFlight(), 6)
  await t.rejects(bug, { message: 'a bug' })
  await mutex.idle()
  t.same(await Promise.all([...rest, other]), ['no', 'taken', 'no', 'no', 'no'])
  t.same(log, ['a begins', 'z begins', 'z ends', 'a ends', 'b begins', 'b ends', 'c begins', 'c ends', 'd begins', 'd ends', 'e begins', 'e ends'])
})

t.test('tasks of one owner run together, unless another owner waits before them', async t => {
  const mutex = createKeyedMutex()
  const log: string[] = []
  const work = (owner: string, name: string) => run(mutex, 'x', async () => {
    log.push(`${name} begins`)
    await sleep(20)
    log.push(`${name} ends`)
  }, owner)
  await Promise.all([work('a', '1'), work('a', '2'), work('b', '3'), work('a', '4'), work('a', '5')])
  t.same(log, ['1 begins', '2 begins', '1 ends', '2 ends', '3 begins', '3 ends', '4 begins', '5 begins', '4 ends', '5 ends'])
})

t.test('createSlices bounds the time that long tasks together take from the event loop', async t => {
  const slice = createSlices(5)
  let turns = 0
  let isOver = false
  const watch = () => {
    turns++
    if (!isOver) setImmediate(watch)
  }
  watch()
  const order: number[] = []
  await Promise.all(Array.from({ length: 10 }, async (_, worker) => {
    for (let step = 0; step < 20; step++) {
      await slice()
      for (const end = performance.now() + 1; performance.now() < end;);
    }
    order.push(worker)
  }))
  isOver = true
  t.ok(turns > 10, `200 ms of work take more than ten turns of the event loop, and took ${turns}`)
  t.same(order.toSorted((a, b) => a - b), Array.from({ length: 10 }, (_, worker) => worker))
})
