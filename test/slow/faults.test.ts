import { t } from 'tap'
import { everyFault } from '../scenarios.ts'

t.test('under every fault, with 200 requests each, every answer keeps its promise', async t => {
  const { statuses, found } = await everyFault(t, { requests: 200 })
  t.same(found, [])
  for (const [name, counts] of Object.entries(statuses)) {
    t.comment(`${name}: ${JSON.stringify(counts)}`)
    t.same(Object.keys(counts).filter(status => !['200', '202', '422', '502'].includes(status)), [], `${name}: each answer is 200, 202, 422 or 502`)
  }
})
