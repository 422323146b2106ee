import { t } from 'tap'
import { fuzzBodies, fuzzBytes } from './fuzz.ts'

// test/slow/fuzz.test.ts has the same with more cases.

t.test('requests of all sorts of callers are answered by the rules, and Mixpanel gets the identities of allowed ones', async t => {
  await fuzzBodies(t, 3000)
})

t.test('of mutated bytes, Mixpanel gets only identities of allowed and unambiguous requests', async t => {
  await fuzzBytes(t, 1000)
})
