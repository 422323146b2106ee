import { t } from 'tap'
import { fuzzBodies, fuzzBytes } from '../fuzz.ts'

t.test('25,000 bodies get 200 or 400, and Mixpanel gets only what its strict validation accepts', async t => {
  await fuzzBodies(t, { mutations: 20_000, arbitrary: 5000 })
})

t.test('2,000 mutated requests get an answer or a closed connection, and the relay still serves', async t => {
  await fuzzBytes(t, 2000)
})
