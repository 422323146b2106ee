import { t } from 'tap'
import { fuzzBodies, fuzzBytes } from './fuzz.ts'

t.test('any body gets 200 or 400, and Mixpanel gets only what its strict validation accepts', async t => {
  await fuzzBodies(t, { mutations: 1000, arbitrary: 300 })
})

t.test('any mutated request gets an answer or a closed connection, and the relay still serves', async t => {
  await fuzzBytes(t, 200)
})
