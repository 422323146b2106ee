import { t } from 'tap'
import { everyFault } from '../scenarios.ts'

t.test('every fault, 200 requests each: nobody is lost, nobody is told a lie', async t => {
  const { told, broken } = await everyFault(t, { requests: 200 })
  t.same(broken, [])
  for (const [name, statuses] of Object.entries(told)) {
    t.comment(`${name}: ${JSON.stringify(statuses)}`)
    t.same(Object.keys(statuses).filter(status => !['200', '202', '422', '502'].includes(status)), [], name)
  }
})
