import neostandard, { plugins } from 'neostandard'

/** Forbids every relative import but the named ones: the path of an identity leads one way. */
const mayImport = (file, ...modules) => ({
  files: [`src/${file}`],
  rules: {
    'no-restricted-imports': ['error', {
      patterns: [{
        regex: `^\\.(?!\\.?/(?:${modules.map(module => module.replaceAll('.', '\\.')).join('|') || '$'})$)`,
        message: `src/${file} may import ${modules.join(', ') || 'nothing of ours'}.`
      }, {
        regex: file === 'mixpanel.ts' ? '^$' : '^undici$',
        message: 'Only mixpanel.ts speaks to Mixpanel.'
      }]
    }]
  }
})

export default [
  ...neostandard({ ts: true, ignores: ['dist', '.tap'] }),
  {
    rules: {
      '@stylistic/max-len': ['error', { code: 120, ignoreUrls: true, ignoreRegExpLiterals: true }],
      // A TypeBox schema and its type share one name.
      '@typescript-eslint/no-redeclare': 'off',
      'max-lines': ['error', 150]
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
  mayImport('config.ts'),
  mayImport('identity.ts'),
  mayImport('verdict.ts'),
  mayImport('problem.ts', 'identity.ts'),
  mayImport('event.ts', 'identity.ts'),
  mayImport('mixpanel.ts', 'config.ts', 'event.ts', 'verdict.ts'),
  mayImport('count.ts'),
  mayImport('batcher.ts', 'count.ts'),
  mayImport('breaker.ts'),
  mayImport('delivery.ts', 'log.ts', 'breaker.ts', 'config.ts', 'event.ts', 'mixpanel.ts', 'verdict.ts'),
  mayImport('log.ts'),
  mayImport('redis.ts', 'log.ts'),
  mayImport('order.ts', 'count.ts'),
  mayImport('outbox/outbox.ts', 'log.ts', 'event.ts'),
  mayImport('outbox/directory.ts', 'outbox.ts'),
  mayImport('outbox/sqlite.ts', 'log.ts', 'batcher.ts', 'directory.ts', 'event.ts', 'outbox.ts',
    'statements.ts'),
  mayImport('outbox/statements.ts'),
  mayImport('outbox/scripts.ts'),
  mayImport('outbox/redis.ts', 'log.ts', 'batcher.ts', 'event.ts', 'outbox.ts', 'redis.ts', 'scripts.ts'),
  mayImport('outbox/open.ts', 'log.ts', 'config.ts', 'mixpanel.ts', 'outbox.ts', 'redis.ts', 'sqlite.ts'),
  mayImport('outbox/round.ts', 'config.ts', 'event.ts', 'outbox.ts', 'suspects.ts', 'verdict.ts'),
  mayImport('outbox/pace.ts', 'breaker.ts'),
  mayImport('outbox/suspects.ts', 'pace.ts'),
  mayImport('outbox/drain.ts', 'log.ts', 'config.ts', 'delivery.ts', 'event.ts', 'outbox.ts', 'pace.ts', 'round.ts',
    'suspects.ts', 'verdict.ts'),
  mayImport('outbox/operators.ts', 'config.ts', 'outbox.ts', 'round.ts'),
  mayImport('outbox/control.ts', 'operators.ts'),
  mayImport('outbox/command.ts', 'config.ts', 'control.ts', 'open.ts', 'operators.ts', 'outbox.ts', 'redis.ts'),
  mayImport('keeper.ts', 'log.ts', 'config.ts', 'delivery.ts', 'event.ts', 'order.ts', 'outbox/drain.ts',
    'outbox/outbox.ts', 'verdict.ts'),
  mayImport('relay.ts', 'log.ts', 'batcher.ts', 'config.ts', 'delivery.ts', 'event.ts', 'identity.ts', 'keeper.ts',
    'mixpanel.ts', 'outbox/outbox.ts', 'verdict.ts'),
  mayImport('plugins/*.ts', 'config.ts', 'mixpanel.ts', 'problem.ts', 'redis.ts', 'relay.ts'),
  mayImport('routes/*.ts', 'answers.ts', 'identity.ts', 'problem.ts', 'relay.ts', 'verdict.ts'),
  mayImport('app.ts', 'config.ts', 'problem.ts', 'redis.ts', 'relay.ts', 'plugins/[a-z]+.ts', 'routes/[a-z]+.ts'),
  mayImport('openapi.ts', 'app.ts', 'config.ts', 'problem.ts', 'relay.ts'),
  mayImport('server.ts', 'app.ts', 'config.ts', 'mixpanel.ts', 'openapi.ts', 'outbox/[a-z]+.ts', 'redis.ts', 'relay.ts')
]
