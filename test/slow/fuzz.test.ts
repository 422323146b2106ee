import { t } from 'tap'
import { fuzzBodies, fuzzBytes } from '../fuzz.ts'

t.test('200,000 requests of all sorts of callers are answered by the rules, and Mixpanel gets the identities of allowed ones', async t => {
  await fuzzBodies(t, 200_000)
})

t.test('of 50,000 mutations of bytes, Mixpanel gets only identities of allowed and unambiguous requests', async t => {
  await fuzzBytes(t, 50_000)
})
