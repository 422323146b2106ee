import neostandard, { plugins } from 'neostandard'

/** The path of an identity leads from left to right: a room imports only from those to its right. */
const floors = [
  ['server.ts', 'sandbox'], ['commands'], ['http'], ['relay'], ['outbox', 'mixpanel'], ['identity'],
  [
    'concurrency', 'config.ts', 'environment.ts', 'secrets.ts', 'log.ts', 'metrics.ts', 'tally.ts', 'redis.ts',
    'process-metrics.ts', 'proxy.ts', 'tunnel.ts', 'get.ts'
  ]
]
const last = floors.length - 1
const layers = floors.slice(1).flatMap((rooms, index) => rooms.map(room => {
  const floor = index + 1
  const forbidden = floors.slice(0, floor).flat().concat(floor === last ? [] : rooms.filter(other => other !== room))
  return {
    files: [room.endsWith('.ts') ? `src/${room}` : `src/${room}/**`],
    rules: {
      'no-restricted-imports': ['error', {
        patterns: [{
          regex: `^\\.\\.?/(?:\\.\\./)*(?:${forbidden.map(name => name.replace('.', '\\.')).join('|')})(?:/|$)`,
          message: `src/${room} may not import ${forbidden.join(', ')}: see "floors" in eslint.config.js.`
        }, {
          regex: room === 'mixpanel' ? '^$' : '^undici(?:/|$)',
          message: 'Only src/mixpanel speaks to Mixpanel.'
        }]
      }]
    }
  }
}))

export default [
  ...neostandard({ ts: true, ignores: ['bundle', 'dist', '.tap', 'examples/service/relay-api.d.ts'] }),
  {
    rules: {
      '@stylistic/max-len': ['error', { code: 120, ignoreUrls: true, ignoreRegExpLiterals: true }],
      // A TypeBox schema and its type share one name.
      '@typescript-eslint/no-redeclare': 'off',
      'max-lines': ['error', 250]
    }
  },
  {
    files: ['test/**', 'bench/**'],
    // Tables read best with a row a line.
    rules: { 'max-lines': 'off', '@stylistic/max-len': ['error', { code: 180, ignoreStrings: true }] }
  },
  {
    files: ['src/**'],
    ignores: ['src/server.ts', 'src/sandbox/server.ts', 'src/sandbox/demo.ts'],
    plugins: { n: plugins.n },
    rules: {
      'n/no-process-env': 'error',
      'no-restricted-globals': ['error', { name: 'process', message: 'Only server.ts touches the process.' }]
    }
  },
  ...layers
]
